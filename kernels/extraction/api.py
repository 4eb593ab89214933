"""Extractor: modal tokens attend to all tiles of their case."""

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
from modaltune.kernels.extraction import ops
from modaltune.kernels.extraction.reference import extract_reference


def _choose(impl: str, queries: Tensor, x: Tensor, num_heads: int) -> str:
    """Return the implementation to run, with the reason where the kernels can't be it."""
    beyond = ops.beyond_triton(operator_dtype(x), queries.shape[1], queries.shape[2] // num_heads)
    if impl == "triton" and beyond:
        raise OutOfReachError(f"extract: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    return choose_impl("extract", impl, x.device, available)


def extract(
    queries: Tensor,
    x: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    num_heads: int,
    offsets: Tensor | None = None,
    num_prefix: int = 0,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Aggregate tiles into modal tokens: attention of G queries over the L tiles of each case.

    Keys, values and attention weights are computed again in the backward pass. Saved for it: the
    inputs, as they are, the result in float32 and a log-sum-exp of each head, `4 B G (E + heads)`
    bytes (float64 inputs: twice), and `8 (B + 1)` of offsets; nothing of size L, and nothing at all
    where no input needs a gradient. Gradients that are not needed are not computed.

    Args:
        queries: `[B, G, E]` projected queries of the modal tokens; E is heads x head width.
        x: `[N, D]` tokens of all cases, packed.
        norm_weight: `[D]` LayerNorm scale on the tiles.
        norm_bias: `[D]` LayerNorm shift.
        kv_weight: `[2E, D]` key projection over value projection.
        kv_bias: `[2E]`.
        num_heads: Attention heads; divides E.
        offsets: `[B + 1]` integer rows of each case; None for one case.
        num_prefix: Rows at the start of each case (cls) that are not attended to.
        eps: LayerNorm epsilon.
        impl: `auto`, `triton` (float16 and bfloat16 with G up to 128, float32 with G up to 80;
            heads up to 128 wide; CUDA, or CPU tensors under `TRITON_INTERPRET=1`), `cpu` or
            `reference`. `auto` takes the reference on a GPU for what triton doesn't cover.

    Returns:
        `[B, G, E]` attended values, before the output projection; zero for a case without tiles.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or offsets contradict each other.
        RuntimeError: The implementation asked for can't run here.

    Source: ModalTune (Ramanathan et al., 2025), extractor of the Modal Adapter.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("queries", queries, (None, None, None))
    cases, _, inner = queries.shape
    named = {
        "queries": (queries, tuple(queries.shape)),
        "norm_weight": (norm_weight, (x.shape[1],)),
        "norm_bias": (norm_bias, (x.shape[1],)),
        "kv_weight": (kv_weight, (2 * inner, x.shape[1])),
        "kv_bias": (kv_bias, (2 * inner,)),
    }
    mixed = is_autocast_on(x.device)
    for name, (tensor, shape) in named.items():
        check_shape(name, tensor, shape)
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), "
            f"got {tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
    require(
        num_heads >= 1 and inner % num_heads == 0,
        f"num_heads must divide {inner}, got {num_heads}",
    )
    require(num_prefix >= 0, f"num_prefix must be at least 0, got {num_prefix}")
    bounds = check_offsets(offsets, x.shape[0])
    require(
        bounds.numel() == cases + 1,
        f"offsets must hold one row range per case ({cases}), got {bounds.numel() - 1}",
    )
    weights = (norm_weight, norm_bias, kv_weight, kv_bias)
    chosen = _choose(impl, queries, x, num_heads)
    if chosen == "reference":
        return extract_reference(
            queries,
            x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            kv_weight=kv_weight,
            kv_bias=kv_bias,
            num_heads=num_heads,
            offsets=bounds,
            num_prefix=num_prefix,
            eps=eps,
        )
    out, _, _ = ops.extract_fwd(queries, x, *weights, bounds, num_heads, num_prefix, eps, chosen)
    return out
