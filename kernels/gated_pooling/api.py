"""Public entry of gated attention pooling."""

from __future__ import annotations

from torch import Tensor

from modaltune.kernels._checks import (
    check_float,
    check_offsets,
    check_shape,
    is_autocast_on,
    operator_dtype,
    require,
)
from modaltune.kernels._dispatch import OutOfReachError, choose_impl
from modaltune.kernels.gated_pooling import ops
from modaltune.kernels.gated_pooling.reference import gated_pool_reference


def gated_pool(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    offsets: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pool the tiles of each case into C vectors, weighted by gated attention (ABMIL).

        h_l = tanh(V x_l + bV) * sigmoid(U x_l + bU)      a_lc = s_c . h_l + bs_c
        w_lc = softmax of a_lc over the tiles l of a case  pooled_bc = sum_l w_lc x_l

    Both outputs are differentiable. The backward pass recomputes h: beyond its inputs, a call
    saves its two outputs and `4 * B * C` bytes (float32 log-sum-exp), or nothing where no input
    needs a gradient. Gradients of frozen inputs are not computed. In float16, gradients need the
    usual loss scaling: attention weights of a large slide lie near the smallest normal number.

    Args:
        x: `[N, D]` tile features of all cases, packed case after case without padding.
        value_weight: `[K, D]` V, in the dtype of `x` (under autocast any floating dtype).
        value_bias: `[K]` bV.
        gate_weight: `[K, D]` U.
        gate_bias: `[K]` bU.
        score_weight: `[C, K]` s, one row per attention head (class); at most 16 on the Triton path.
        score_bias: `[C]` bs. It shifts the scores and leaves the pooled vectors as they are.
        offsets: `[B + 1]` integers, best on the CPU: case b owns rows
            `offsets[b]:offsets[b + 1]`, which may be none. Default: one case.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`), `cpu` or
            `reference`.

    Returns:
        Pooled tiles `[B, C, D]` in the dtype of `x`, zero for a case without tiles; and the raw
        scores a `[N, C]` in float32 (float64 for float64 inputs), whose softmax over a case's rows
        is its attention map.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices, offsets or impl break the rules above.
        RuntimeError: `impl` was asked for by name and can't run here.

    Source:
        Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018),
        equations 7 and 9; C heads as in CLAM's multi-branch form.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("score_weight", score_weight, (None, None))
    heads, hidden = score_weight.shape
    require(
        heads > 0 and hidden > 0 and x.shape[1] > 0,
        f"C, K and D must be at least 1, got {heads}, {hidden}, {x.shape[1]}",
    )
    named = {
        "value_weight": (value_weight, (hidden, x.shape[1])),
        "value_bias": (value_bias, (hidden,)),
        "gate_weight": (gate_weight, (hidden, x.shape[1])),
        "gate_bias": (gate_bias, (hidden,)),
        "score_weight": (score_weight, (heads, hidden)),
        "score_bias": (score_bias, (heads,)),
    }
    mixed = is_autocast_on(x.device)
    for name, (tensor, shape) in named.items():
        check_shape(name, tensor, shape)
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), "
            f"got {tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
    bounds = check_offsets(offsets, x.shape[0])
    beyond = ops.beyond_triton(operator_dtype(x), heads)
    if impl == "triton" and beyond:
        raise OutOfReachError(f"gated_pool: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    chosen = choose_impl("gated_pool", impl, x.device, available)
    weights = (value_weight, value_bias, gate_weight, gate_bias, score_weight, score_bias)
    if chosen == "reference":
        return gated_pool_reference(x, *weights, bounds)
    pooled, scores, _ = ops.gated_pool_fwd(x, *weights, bounds, chosen)
    return pooled, scores
