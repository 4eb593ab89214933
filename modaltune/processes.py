"""One process or many, full or mixed precision: what accelerate does for the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modaltune.errors import InputError
from modaltune.learner import Learner
from modaltune.train_config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

SCALER_START = 2.0**15  # of the gradient scaler under fp16, as published


def make_accelerator(learner: Learner, config: TrainConfig) -> Accelerator:
    """Return accelerate's view of this process, for a learner that lies on its device.

    Raises:
        InputError: fp16 on a CPU, which accelerate does not train in.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradScalerKwargs

    on_cpu = learner.trainable_parameters()[0].device.type == "cpu"
    if on_cpu and config.precision == "fp16":
        raise InputError(
            "precision must be no or bf16 on a CPU, got fp16; train on a GPU, or in float32 (no)"
        )
    # A process may train twice; accelerate remembers the first precision otherwise.
    AcceleratorState._reset_state(reset_partial_state=False)
    scaler = GradScalerKwargs(init_scale=SCALER_START)
    return Accelerator(mixed_precision=config.precision, cpu=on_cpu, kwargs_handlers=[scaler])


def add_over_processes(
    parameters: list[nn.Parameter], loss: Tensor, accelerator: Accelerator
) -> Tensor:
    """Add up gradients and loss over processes; a gradient that nobody has stays None.

    One exchange after the last of a step's several backward passes (one per task prompt and batch),
    which wrappers that exchange during each backward pass can't give.
    """
    has = [p.grad is not None for p in parameters]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    facts = torch.tensor(has, device=loss.device).to(loss.dtype)
    sent = torch.cat([*(g.reshape(-1) for g in flat), facts, loss.reshape(1)])
    added = accelerator.reduce(sent, "sum")
    at = 0
    for parameter, found in zip(parameters, added[-1 - len(parameters) : -1].tolist(), strict=True):
        rows = added[at : at + parameter.numel()]
        parameter.grad = rows.reshape(parameter.shape).to(parameter.dtype) if found else None
        at += parameter.numel()
    return added[-1].to(loss.dtype)
