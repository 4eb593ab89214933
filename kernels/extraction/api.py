"""Extractor: modal tokens attend to all tiles of their case."""

from __future__ import annotations

from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.extraction.cpu import extract_cpu
from modaltune.kernels.extraction.reference import extract_reference


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
        impl: `auto`, `triton`, `cpu` or `reference`.

    Returns:
        `[B, G, E]` attended values, before the output projection; zero for a case without tiles.

    Raises:
        ValueError: Shapes contradict each other.
        RuntimeError: The implementation asked for can't run here.

    Source: ModalTune (Ramanathan et al., 2025), extractor of the Modal Adapter.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("queries", queries, (None, None, None))
    cases, _, inner = queries.shape
    check_shape("kv_weight", kv_weight, (2 * inner, x.shape[1]))
    check_shape("kv_bias", kv_bias, (2 * inner,))
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(name, tensor, (x.shape[1],))
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
    chosen = choose_impl("extract", impl, x.device, ("cpu", "reference"))
    run = extract_cpu if chosen == "cpu" else extract_reference
    return run(
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
