"""Targets of tuning: label embeddings through a frozen random projector, and the loss to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modaltune.errors import CheckpointError, InputError

_LAYER_NORM_EPS = 1e-5
# Published key below "conv1." -> ours; there the layers are 1x1 convolutions over a 1x1 image.
_REFERENCE_KEYS = {
    "conv1.0.weight": "in_proj.weight",
    "conv1.0.bias": "in_proj.bias",
    "conv1.1.weight": "norm.weight",
    "conv1.1.bias": "norm.bias",
    "conv1.3.weight": "out_proj.weight",
    "conv1.3.bias": "out_proj.bias",
}


@dataclass(frozen=True)
class Targets:
    """What B cases are tuned towards; a learner reads what it needs.

    Attributes:
        text: `[B, T, out_features]` unit rows, one per task prompt; None without text targets.
        classes: `[B]` int64, -1 for a case that is not classified.
        durations: `[B]` months to death or last follow-up, NaN where unknown.
        events: `[B]` 1 died, 0 censored, NaN where unknown.
    """

    text: Tensor | None
    classes: Tensor
    durations: Tensor
    events: Tensor

    @classmethod
    def of_text(cls, text: Tensor) -> Targets:
        """Return targets that know the text rows `[B, T, out_features]` and nothing else."""
        unknown = torch.full((len(text),), math.nan)
        return cls(text, torch.full((len(text),), -1), unknown, unknown.clone())

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, indices: Sequence[int]) -> Targets:
        """Return the targets of some cases."""
        chosen = list(indices)
        return self._each(lambda t: t[chosen])

    def to(self, device: torch.device | str) -> Targets:
        """Return the targets on a device."""
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        text = None if self.text is None else change(self.text)
        return Targets(text, change(self.classes), change(self.durations), change(self.events))


class TextProjector(nn.Module):
    """Maps label embeddings to the width of the model's output; random, frozen, and saved.

    `t = out_proj(ReLU(LayerNorm(in_proj(e))))`, row by row. The weights are drawn once and never
    trained, so they belong to the targets: a model is saved with its projector.

    Args:
        text_dim: Width of the label embeddings.
        out_dim: Width of the model's output.
        seed: Seed of the weights; None draws from torch's global generator. The same seed gives
            the weights that the published code draws after `torch.manual_seed(seed)`.

    Raises:
        InputError: A width is not positive.

    Source: METHOD 3.10.
    """

    def __init__(self, text_dim: int, out_dim: int = 256, *, seed: int | None = None) -> None:
        super().__init__()
        if text_dim < 1 or out_dim < 1:
            raise InputError(
                f"text_dim and out_dim must be positive, got {text_dim} and {out_dim}; "
                "take text_dim from the text encoder's width"
            )
        self.text_dim = text_dim
        self.out_dim = out_dim
        # Left unfilled by torch, so that the global generator is not touched under a seed.
        self.in_proj = nn.utils.skip_init(nn.Linear, text_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim, eps=_LAYER_NORM_EPS)
        self.out_proj = nn.utils.skip_init(nn.Linear, out_dim, out_dim)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for layer in (self.in_proj, self.out_proj):
            _init_like_conv(layer, generator)
        self.requires_grad_(False)

    def forward(self, text: Tensor) -> Tensor:
        """Project label embeddings `[..., text_dim]` to `[..., out_dim]`, not normalised."""
        if text.shape[-1] != self.text_dim:
            raise InputError(
                f"text must have {self.text_dim} columns, as the projector was built for, got "
                f"shape {tuple(text.shape)}; use the text encoder that the model was tuned with"
            )
        return self.out_proj(F.relu(self.norm(self.in_proj(text))))

    def project(self, text: Tensor) -> Tensor:
        """Return the targets of label embeddings: projected rows of length one.

        Args:
            text: `[..., text_dim]` floating-point label embeddings, e.g. `[R, text_dim]`.

        Returns:
            `[..., out_dim]` in the projector's dtype, each row of unit length.

        Raises:
            InputError: The width is another one than the projector was built for.
        """
        return F.normalize(self(text.to(self.in_proj.weight.dtype)), dim=-1)


def _init_like_conv(layer: nn.Linear, generator: torch.Generator | None) -> None:
    """Fill a layer as torch fills a 1x1 convolution: uniform within 1/sqrt(fan_in)."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def distillation_loss(
    z: Tensor, t_hat: Tensor, temperature: float = 1.0, factor: float = 10.0
) -> Tensor:
    """Measure how far the model's outputs are from the targets of their task prompts.

    `loss_b = factor * tau^2 * sum_k KL(softmax(t_hat_bk / tau) || softmax(z_hat_bk / tau))` with
    `z_hat = z / ||z||`. Softmax of a unit vector is nearly uniform, so the terms of the sum nearly
    cancel: in float32 that costs about 1e-6 absolute. The few thousand numbers are therefore
    computed in float64, as differences of log_softmax.

    Args:
        z: `[B, T, out_dim]` outputs, one per task prompt, not normalised.
        t_hat: `[B, T, out_dim]` targets of the same prompts, rows of unit length, from
            `TextProjector.project`.
        temperature: Softmax temperature tau, > 0.
        factor: Weight of the loss.

    Returns:
        `[B]` loss per case, summed over tasks; float32, or float64 for float64 outputs.

    Raises:
        InputError: Shapes differ, or the temperature is not positive.

    Source: METHOD 3.10.
    """
    if z.shape != t_hat.shape or z.dim() != 3:
        raise InputError(
            "z and t_hat must both be [cases, tasks, width], got shapes "
            f"{tuple(z.shape)} and {tuple(t_hat.shape)}; pick the target rows of the tasks first"
        )
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be > 0, got {temperature}; the published value is 1")
    log_p = F.log_softmax(t_hat.double() / temperature, dim=-1)
    log_q = F.log_softmax(F.normalize(z.double(), dim=-1) / temperature, dim=-1)
    per_task = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # [B, T]
    loss = factor * temperature**2 * per_task.sum(dim=-1)
    return loss if z.dtype == torch.float64 else loss.float()


def load_reference_projector(
    tensors: Mapping[str, Tensor], prefix: str = "projector/"
) -> TextProjector:
    """Build a projector from tensors under the published names.

    Args:
        tensors: `<prefix>conv1.{0,3}.{weight,bias}` as 1x1 convolutions `[out, in, 1, 1]` and
            `<prefix>conv1.1.{weight,bias}` `[out, 1, 1]`; other keys are ignored.
        prefix: What stands before `conv1`.

    Raises:
        CheckpointError: A tensor is missing or has another shape; names it.
    """
    missing = [prefix + key for key in _REFERENCE_KEYS if prefix + key not in tensors]
    if missing:
        raise CheckpointError(
            f"tensors must hold the published projector, got no {', '.join(missing)}; "
            "check the file and the prefix"
        )
    first = tensors[f"{prefix}conv1.0.weight"]
    if first.dim() != 4:
        raise CheckpointError(
            f"{prefix}conv1.0.weight must be [out, in, 1, 1], got shape {tuple(first.shape)}; "
            "check that the file is a published text projector"
        )
    projector = TextProjector(text_dim=first.shape[1], out_dim=first.shape[0], seed=0)
    state = projector.state_dict()
    for key, ours in _REFERENCE_KEYS.items():
        published = tensors[prefix + key]
        expected = _published_shape(key, state[ours])
        if tuple(published.shape) != expected:
            raise CheckpointError(
                f"{prefix}{key} must have shape {expected}, got {tuple(published.shape)}; "
                "check that the file is a published text projector"
            )
        state[ours] = published.reshape(state[ours].shape)
    projector.to(first.dtype).load_state_dict(state)
    return projector


def reference_projector_state(
    projector: TextProjector, prefix: str = "projector/"
) -> dict[str, Tensor]:
    """Return a projector's tensors under the published names and shapes.

    Args:
        projector: Ours.
        prefix: What to put before `conv1`.

    Returns:
        What `load_reference_projector` reads; the tensors share memory with the projector.
    """
    state = projector.state_dict()
    return {
        prefix + key: state[ours].reshape(_published_shape(key, state[ours]))
        for key, ours in _REFERENCE_KEYS.items()
    }


def _published_shape(key: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape of one of our tensors as part of a net of 1x1 convolutions over `[C, 1, 1]` images."""
    is_conv_bias = key in ("conv1.0.bias", "conv1.3.bias")
    return tuple(tensor.shape) if is_conv_bias else (*tensor.shape, 1, 1)
