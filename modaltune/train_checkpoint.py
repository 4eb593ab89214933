"""Checkpoints of a training run: all that decides how it goes on, whole or not at all.

A checkpoint is `step-<steps>.safetensors` (trainable weights, buffers, optimiser, generators) and
`step-<steps>.json` (position, schedule, scaler, checksums), written in this order, each atomically.
A JSON file that is torn, or whose tensors do not have the checksum it states, is not loaded: the
checkpoint before it is. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modaltune.checkpoint import file_sha256
from modaltune.engine.atomic import atomic_path, is_temporary, write_json_atomic
from modaltune.errors import CheckpointError
from modaltune.train import EpochLog, Training

logger = logging.getLogger(__name__)

FORMAT = "modaltune-training"
FORMAT_VERSION = 1
_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk, verified.

    Attributes:
        path: Its JSON file.
        state: What the JSON holds.
        tensors: What the safetensors file holds, by name.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def model_state(self) -> dict[str, Tensor]:
        """Return weights and buffers by name."""
        own = (name for name in self.tensors if name.startswith(_MODEL))
        return {name.removeprefix(_MODEL): self.tensors[name] for name in own}


def tuned_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state without its frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach() for name, t in model.state_dict().items() if name not in frozen}


def frozen_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names and bytes of a model's frozen parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
            plain = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    folder: Path, training: Training, steps: int, facts: Mapping[str, Any]
) -> Path | None:
    """Write where a training run stands; in every process, of which the first one writes.

    Args:
        folder: Of the checkpoints.
        training: The run, between two steps or epochs.
        steps: Optimiser steps done since its beginning.
        facts: JSON values to keep: what the run's caller has to know to go on.

    Returns:
        The JSON file, or None in the other processes.
    """
    accelerator = training.accelerator
    tensors = {f"{_MODEL}{k}": t for k, t in tuned_state(training.learner.model).items()}
    optimizer = training.optimizer.state_dict()
    for number, values in optimizer["state"].items():
        tensors |= {f"{_OPTIMIZER}{number}.{k}": v for k, v in values.items()}
    tensors[f"{_RNG}order"] = training.epoch_order
    for name, state in _torch_generators(training).items():
        # Every process draws its own dropout.
        rows = accelerator.gather(state.to(accelerator.device)[None])
        tensors[f"{_RNG}{name}"] = rows.cpu()
    if not accelerator.is_main_process:
        return None
    stem = folder / f"step-{steps:09d}"
    with atomic_path(stem.with_suffix(".safetensors")) as temporary:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, temporary)
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "steps": steps,
        "epoch": training.epoch,
        "step": training.step,
        "loss_sum": training.loss_sum,
        "log": [asdict(one) for one in training.log],
        "param_groups": optimizer["param_groups"],
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "processes": accelerator.num_processes,
        "python_rng": random.getstate(),
        "numpy_rng": _numpy_state(),
        "tensors_sha256": file_sha256(stem.with_suffix(".safetensors")),
        "facts": dict(facts),
    }
    body = json.loads(json.dumps(body))  # as it will be read: tuples are lists
    write_json_atomic(stem.with_suffix(".json"), {**body, "sha256": _body_sha256(body)})
    return stem.with_suffix(".json")


def restore(saved: Saved, training: Training) -> None:
    """Put a checkpoint into a run that was just begun in the same way.

    Raises:
        CheckpointError: It is of another model, or of another number of processes.
    """
    state, accelerator = saved.state, training.accelerator
    if state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"processes must be {state['processes']}, as when {saved.path.name} was written, got "
            f"{accelerator.num_processes}; start as many, since each draws its own dropout"
        )
    load_tuned(training.learner.model, saved)
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.tensors.items():
        if name.startswith(_OPTIMIZER):
            number, key = name.removeprefix(_OPTIMIZER).split(".", 1)
            optimizer.setdefault(int(number), {})[key] = tensor
    groups = state["param_groups"]
    for group in groups:
        group["betas"] = tuple(group["betas"])
    training.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    training.epoch, training.step = state["epoch"], state["step"]
    training.loss_sum = state["loss_sum"]
    training.log = [EpochLog(**one) for one in state["log"]]
    training.epoch_order = saved.tensors[f"{_RNG}order"]
    _restore_generators(saved, training)


def load_tuned(model: nn.Module, saved: Saved) -> None:
    """Load the weights of a checkpoint into a model; its frozen ones stay.

    Raises:
        CheckpointError: They are of another model.
    """
    own, found = tuned_state(model), saved.model_state()
    wrong = [k for k in own.keys() | found.keys() if k not in own or k not in found]
    wrong += [k for k in own.keys() & found.keys() if own[k].shape != found[k].shape]
    if wrong:
        raise CheckpointError(
            f"{saved.path} must hold the weights of this model, got others for {len(wrong)} "
            f"tensors, such as {sorted(wrong)[0]}; go on with the configuration it was begun with"
        )
    model.load_state_dict(found, strict=False)


def read_checkpoint(path: Path) -> Saved:
    """Read one checkpoint, verified.

    Raises:
        CheckpointError: It is torn, damaged, or of a newer format.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        body = {k: v for k, v in read.items() if k != "sha256"}
        if read["sha256"] != _body_sha256(body):
            raise ValueError("another checksum than it states")
        if body["format"] != FORMAT or body["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format {body['format']} {body['format_version']}")
        tensors = path.with_suffix(".safetensors")
        if file_sha256(tensors) != body["tensors_sha256"]:
            raise ValueError(f"{tensors.name} with another checksum than stated")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} must be whole, got {error}; restore the file, or train anew into "
            "another output.folder"
        ) from error
    return Saved(path, body, load_file(tensors))


def newest_checkpoint(folder: Path) -> Saved | None:
    """Return the latest whole checkpoint of a folder; torn ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            logger.warning(
                "checkpoint %s is passed over for an earlier one: %s", path, error.__cause__
            )
    return None


def prune_checkpoints(folder: Path, keep_last: int, best: str | None) -> None:
    """Remove all checkpoints but the last ones and the best, and what killed writers left.

    Args:
        folder: Of the checkpoints.
        keep_last: How many of the latest stay.
        best: Stem of the one that stays whatever its age.
    """
    stems = sorted(path.stem for path in folder.glob("step-*.json"))
    kept = {*stems[-keep_last:], *([] if best is None else [best])}
    for path in folder.iterdir():
        if is_temporary(path) or (path.name.startswith("step-") and path.stem not in kept):
            path.unlink(missing_ok=True)


def _body_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _torch_generators(training: Training) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if training.accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(training.accelerator.device)
    return states


def _restore_generators(saved: Saved, training: Training) -> None:
    rank, device = training.accelerator.process_index, training.accelerator.device
    torch.set_rng_state(saved.tensors[f"{_RNG}torch"][rank])
    if device.type == "cuda" and f"{_RNG}cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors[f"{_RNG}cuda"][rank], device)
    version, internal, gauss = saved.state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved.state["numpy_rng"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]
