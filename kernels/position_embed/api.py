"""Patch embedding epilogue: positions from coordinates and the cls token, without a table."""

from __future__ import annotations

from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import OutOfReachError, choose_impl
from modaltune.kernels.position_embed import ops
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

        out = [cls; x_1 + p_1; x_2 + p_2; ...] per case
        p = [sin(j w), cos(j w), sin(i w), cos(i w)]    w_k = 10000^(-4 k / D), k = 0 .. D / 4 - 1

    for a tile in cell (i, j). The published encoder keeps a table of 1,000,001 x 768 rows (2.9 GiB)
    for this; here rows are made where they are added. `cpu` and `reference` compute them in float64
    and cast; `triton` reduces angles exactly in integers and is within 8e-8 of float64 (a float32
    step of values below 1 is 6e-8) for every cell from -10^6 to 10^6. Gradients flow to x and
    cls_token. Saved for backward: the offsets, 8 (B + 1) bytes on the CPU, and nothing else.

    Args:
        x: `[N, D]` embedded tiles of all cases, packed; D is a multiple of 4.
        cells: `[N, 2]` integer grid cells (first, second coordinate).
        cls_token: `[D]` (or `[1, 1, D]`); it has no position.
        offsets: `[B + 1]` integer rows of each case in `x`; None for one case.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`; float16,
            bfloat16, float32), `cpu` or `reference`.

    Returns:
        `[N + B, D]` in the dtype of `x`, also under autocast; case b starts at row
        `offsets[b] + b`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes contradict each other or cells are not integers.
        RuntimeError: `impl` was asked for by name and can't run here.

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
    for name, tensor in (("cells", cells), ("cls_token", cls_token)):
        require(
            tensor.device == x.device,
            f"{name} must be on the device of x ({x.device}), got {tensor.device}",
        )
    bounds = check_offsets(offsets, x.shape[0])
    beyond = ops.why_not_triton(x.dtype)
    if impl == "triton" and beyond:
        raise OutOfReachError(f"embed_positions: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    chosen = choose_impl("embed_positions", impl, x.device, available)
    if chosen == "reference":
        return embed_positions_reference(x, cells, cls_token, offsets=bounds)
    return ops.position_embed_fwd(x, cells, cls_token, bounds, chosen)
