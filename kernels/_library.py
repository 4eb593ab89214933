"""Registration of operators with torch.library: one namespace, one way of doing it.

Every differentiable op is two operators, `modaltune::<op>_fwd` and `modaltune::<op>_bwd`, each with
a last argument `impl` (`triton` or `cpu`). The forward one carries the autograd formula, which
calls the backward one; both have fakes, so `torch.compile(fullgraph=True)` traces through them.
Their bodies are opaque to tracing and may look at values (offsets on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

LIBRARY = torch.library.Library("modaltune", "FRAGMENT")


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator with one body for every device and a fake for tracing.

    Args:
        schema: `name(Tensor x, ..., str impl) -> ...`.
        body: Runs on real tensors, below autograd; picks the implementation by `impl`.
        fake: Returns empty tensors of the right shape, dtype and device.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"modaltune::{name}", fake, lib=LIBRARY)


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Give the operator `name` its autograd formula."""
    torch.library.register_autograd(
        f"modaltune::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def autocast(name: str) -> None:
    """Cast floating tensors, but those of float64, to the dtype of autocast where autocast is on.

    `torch.library.register_autocast` casts to one dtype fixed beforehand, whatever is asked for.
    """
    for device in ("cuda", "cpu"):
        LIBRARY.impl(name, partial(_under_autocast, name, device), f"Autocast{device.upper()}")


def _under_autocast(name: str, device: str, *arguments: Any) -> Any:
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != device:
            return value
        is_cast = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if is_cast else value

    with torch.autocast(device, enabled=False):
        return getattr(torch.ops.modaltune, name)(*(cast(value) for value in arguments))


def recomputed_vjp(
    run: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_out: Tensor,
) -> list[Tensor | None]:
    """Return gradients of `run(*tensors)` by running it again with gradients on.

    Args:
        run: A differentiable function of `tensors`.
        tensors: Its arguments; None stays None.
        needs: Which of them need a gradient.
        grad_out: Gradient of its output.
    """
    with torch.enable_grad():
        leaves = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needs, strict=True)
        ]
        out = run(*leaves)
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(out, wanted, grad_out)) if wanted else iter(())
    return [
        next(grads) if need and t is not None else None
        for t, need in zip(leaves, needs, strict=True)
    ]
