"""Public entry of attention with a two-dimensional ALiBi bias."""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.alibi_attn.ops import require_triton, why_not_triton
from modaltune.kernels.alibi_attn.reference import alibi_attention_reference

logger = logging.getLogger(__name__)


def _check_arguments(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, slopes: Tensor, num_prefix: int
) -> None:
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    rows, heads, dim = q.shape
    require(heads > 0 and dim > 0, f"q must have heads and width, got shape {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, (rows, heads, dim))
        same = tensor.dtype == q.dtype and tensor.device == q.device
        require(
            same,
            f"{name} must have the dtype and device of q ({q.dtype}, {q.device}), "
            f"got {tensor.dtype}, {tensor.device}",
        )
    check_shape("grid", grid, (rows, 2))
    whole = not (grid.is_floating_point() or grid.is_complex() or grid.dtype == torch.bool)
    require(whole, f"grid must hold integer cells, got {grid.dtype}; floor-divide pixels first")
    check_float("slopes", slopes)
    check_shape("slopes", slopes, (heads,))
    require(num_prefix >= 0, f"num_prefix must be at least 0, got {num_prefix}")


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    slopes: Tensor,
    *,
    offsets: Tensor | None = None,
    num_prefix: int = 1,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend within each sequence under a bias of `-slope * distance` between grid cells.

        o_ih = sum_j softmax_j( scale * q_ih . k_jh - slope_h * |g_i - g_j| ) v_jh

    Gradients flow to q, k and v; grid and slopes are constants.

    Args:
        q: `[N, H, d]` queries of all sequences, packed row after row without padding.
        k: `[N, H, d]` keys, dtype and device of `q`.
        v: `[N, H, d]` values, dtype and device of `q`.
        grid: `[N, 2]` integer positions in grid cells, from any origin. What the prefix rows hold
            is ignored.
        slopes: `[H]` floating point, bias per cell of Euclidean distance, usually >= 0.
        offsets: `[B + 1]` integers, best on the CPU: sequence b owns rows
            `offsets[b]:offsets[b + 1]`, which may be none. Default: one sequence.
        num_prefix: Rows at the head of each sequence (cls) that have no position: the bias of
            their rows and columns is 0.
        scale: Factor of q . k. Default `d ** -0.5`.
        impl: `auto`, `triton` (GPU: float16, bfloat16, float32, d <= 128), `cpu` or `reference`
            (dense `[H, n, n]` bias, any device, natively differentiable). All but the reference
            take memory linear in the sequence.

    Returns:
        `[N, H, d]` in the dtype of `q`; under autocast `triton` runs in the dtype of autocast, and
        `cpu` in that of the inputs.

    Memory:
        Saved for backward by `triton` and `cpu`: q, k, v and the output (4 N H d elements), a
        log-sum-exp per row and head (4 N H bytes, 8 in float64), grid, slopes and offsets; without
        v and output where neither q nor k needs a gradient; nothing where none does. The backward
        pass computes scores and bias again and takes 4 N H + 8 N bytes more (`triton`).

    Raises:
        TypeError: q or slopes are not floating point.
        ValueError: Shapes, dtypes, offsets, num_prefix, scale or impl break the rules above.
        RuntimeError: `impl` was asked for by name and can't run here.

    Source:
        Press, Smith, Lewis, "Train Short, Test Long" (ICLR 2022), equation of section 3, with the
        distance between tokens taken in the plane as in Ding et al., "A multimodal whole-slide
        foundation model for pathology" (TITAN, 2025), Methods.
    """
    _check_arguments(q, k, v, grid, slopes, num_prefix)
    bounds = check_offsets(offsets, q.shape[0])
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    require(math.isfinite(factor), f"scale must be finite, got {scale}")
    chosen = _choose(q, impl)
    cells, per_head = grid.to(q.device, torch.int64), slopes.detach().to(q.device)
    arguments = (q, k, v, cells, per_head, bounds, num_prefix, factor)
    if chosen == "reference":
        return alibi_attention_reference(*arguments)
    out, _ = torch.ops.modaltune.alibi_attn_fwd(*arguments, chosen)
    return out


def _choose(q: Tensor, impl: str) -> str:
    """Return the implementation; `auto` passes over kernels that don't take these inputs."""
    available: tuple[str, ...] = ("triton", "cpu", "reference")
    if impl == "auto" and q.device.type != "cpu":
        reason = why_not_triton(q)
        if reason:
            available = ("cpu", "reference")
            _say_why(reason)
    chosen = choose_impl("alibi_attention", impl, q.device, available)
    if chosen == "triton":
        require_triton(q)
    return chosen


@cache
def _say_why(reason: str) -> None:
    logger.info("alibi_attention: the Triton path is left out: %s", reason)
