"""Patch embedding epilogue: positions from coordinates and the cls token, without a table."""

from __future__ import annotations

from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.position_embed.cpu import embed_positions_cpu
from modaltune.kernels.position_embed.reference import embed_positions_reference


def embed_positions(
    x: Tensor,
    cells: Tensor,
    cls_token: Tensor,
    *,
    offsets: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add the sin-cos row of each tile's grid cell and put the cls token before each case.

    The published encoder keeps a table of 1,000,001 x 768 rows (2.9 GiB) for this; only rows that
    occur are computed here, in float64, then cast.

    Args:
        x: `[N, D]` embedded tiles of all cases, packed; D is a multiple of 4.
        cells: `[N, 2]` integer grid cells (first, second coordinate).
        cls_token: `[D]` (or `[1, 1, D]`); it has no position.
        offsets: `[B + 1]` integer rows of each case in `x`; None for one case.
        impl: `auto`, `triton`, `cpu` or `reference`.

    Returns:
        `[N + B, D]` in the dtype of `x`; case b starts at row `offsets[b] + b`.

    Raises:
        ValueError: Shapes contradict each other or cells are not integers.

    Source: the published Prov-GigaPath slide encoder; blocks `sin, cos` of the second coordinate,
    then of the first.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("cells", cells, (x.shape[0], 2))
    require(not cells.is_floating_point(), f"cells must be integers, got {cells.dtype}")
    require(x.shape[1] % 4 == 0, f"width of x must be a multiple of 4, got {x.shape[1]}")
    require(
        cls_token.numel() == x.shape[1],
        f"cls_token must have {x.shape[1]} values, got {cls_token.numel()}",
    )
    bounds = check_offsets(offsets, x.shape[0])
    chosen = choose_impl("embed_positions", impl, x.device, ("cpu", "reference"))
    run = embed_positions_cpu if chosen == "cpu" else embed_positions_reference
    return run(x, cells, cls_token, offsets=bounds)
