"""Learning rate of each epoch: linear warm-up, then half a cosine, in closed form."""

from __future__ import annotations

import math

from modaltune.errors import InputError


def learning_rate(
    epoch: int, *, epochs: int, lr: float, warmup_epochs: int = 10, warmup_factor: float = 20.0
) -> float:
    """Return the learning rate used during `epoch`.

    With E epochs, W warm-up epochs and factor F, epochs 0 to W rise in a straight line from
    `lr / F` to `lr`; epoch e > W runs at `lr (1 + cos(pi (e - W - 1) / (E - W))) / 2`, so epochs
    W and W + 1 both run at `lr`, as published. A run of at most W epochs never leaves the ramp
    (as published, too): give a short run a short warm-up.

    Args:
        epoch: 0-based; `epochs` itself is the rate after the last step.
        epochs: Length of the run E, at least 1.
        lr: Highest rate.
        warmup_epochs: W, 0 for none.
        warmup_factor: F, at least 1; the first epoch runs at `lr / F`.

    Raises:
        InputError: An argument is out of range.

    Source:
        METHOD 4.3, the published schedule under its pinned torch 2.0.
    """
    _check(epoch, epochs, lr, warmup_epochs, warmup_factor)
    if epoch <= warmup_epochs:
        progress = epoch / warmup_epochs if warmup_epochs else 1.0
        return lr / warmup_factor * (1 + (warmup_factor - 1) * progress)
    angle = math.pi * (epoch - warmup_epochs - 1) / (epochs - warmup_epochs)
    return lr * (1 + math.cos(angle)) / 2


def _check(epoch: int, epochs: int, lr: float, warmup_epochs: int, warmup_factor: float) -> None:
    """Raise InputError for the first argument that is out of range."""
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}; ask for one epoch or more")
    if not 0 <= epoch <= epochs:
        raise InputError(
            f"epoch must lie in 0..{epochs}, got {epoch}; raise epochs to train for longer"
        )
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr must be positive and finite, got {lr}; the published one is 1e-4")
    if warmup_epochs < 0:
        raise InputError(f"warmup_epochs must be 0 or more, got {warmup_epochs}; 0 means none")
    if not (math.isfinite(warmup_factor) and warmup_factor >= 1):
        raise InputError(
            f"warmup_factor must be at least 1, got {warmup_factor}; 1 starts at the full rate"
        )
