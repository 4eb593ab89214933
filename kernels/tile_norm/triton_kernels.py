"""Triton kernels of tile normalisation: one pass over uint8 tiles, in the layout asked for.

    y[n, c, i, j] = a_c (x[n, i + top, j + left, c] - m_c)                         crop
    u[n, y, j, c] = clamp(Σ_s wx[j, s] x[n, y, fx_j + s, c])                       resize, widths
    y[n, c, i, j] = a_c (clamp(Σ_t wy[i, t] u[n, fy_i + t, j, c]) - m_c)           resize, heights

    a_c = 1 / (255 std_c), m_c = 255 mean_c            clamp to [0, 255], as 8-bit libraries do
    fx, wx, fy, wy: first pixel and weights of each kept output, tables made on the host

Everything is accumulated in float32 and rounded once, in the store. The mean is subtracted before
the scale: near the mean that loses less than a scale and a shift.

A row of a tile is 3 W bytes whose channel is the byte's index modulo 3, so the channels-last
result is the input's rows, converted: neither the load nor the store is strided. For patches the
bytes of a row change places on chip, between a wide load and a wide store.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaltune.kernels._tuning import config, nearest, shipped
from modaltune.kernels.resources import CompileSpec

OP = "tile_norm"
# Up to here the weights of the taps are kept in registers while rows pass by.
MAX_UNROLLED_TAPS = 12
# (dtype in the table, Triton type)
_OUTPUTS = (("fp16", "*fp16"), ("bf16", "*bf16"), ("fp32", "*fp32"))


@triton.jit
def _by_channel(channel, value0, value1, value2):
    return tl.where(channel == 0, value0, tl.where(channel == 1, value1, value2))


@triton.jit
def _place(column, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Return pixel, channel and offset inside the output row's band of a column.

    Channels last (PATCH_W = 0) a column is pixel · 3 + channel. In patches it is
    (patch · 3 + channel) · PATCH_W + pixel inside the patch, the order of the output in memory.
    """
    if PATCH_W == 0:
        pixel = column // 3
        channel = column % 3
        offset = column
    else:
        patch = column // (3 * PATCH_W)
        channel = column // PATCH_W % 3
        within = column % PATCH_W
        pixel = patch * PATCH_W + within
        offset = (patch * 3 + channel) * (PATCH_H * PATCH_W) + within
    return pixel, channel, offset


@triton.jit
def _row_offset(row, row_len, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Return where an output row starts inside its tile's output."""
    if PATCH_W == 0:
        start = row * row_len
    else:
        start = row // PATCH_H * PATCH_H * row_len + row % PATCH_H * PATCH_W
    return start


@triton.jit
def tile_norm_fwd_crop_kernel(
    tile_ptr,
    out_ptr,
    stride_tn,
    stride_th,
    num_rows,
    side,
    row_len,
    scale0,
    scale1,
    scale2,
    centre0,
    centre1,
    centre2,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Crop and standardise BLOCK_R rows of the n · side rows of all tiles.

    `tile_ptr` points at the first kept pixel; with patches BLOCK_C holds a whole row.
    """
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    tile = index // side  # [R]
    row = index - tile * side  # [R]
    mask = (index < num_rows)[:, None] & (column < row_len)[None, :]  # [R, C]
    line = tile.to(tl.int64) * stride_tn + row.to(tl.int64) * stride_th  # [R]
    x = tl.load(tile_ptr + line[:, None] + column[None, :], mask=mask, other=0)  # [R, C] uint8
    pixel, channel, offset = _place(column, PATCH_H, PATCH_W)  # [C]
    if PATCH_W != 0:
        source = tl.where(column < row_len, pixel * 3 + channel, 0)  # [C]
        # [R, C] bytes in output order
        x = tl.gather(x, tl.broadcast_to(source[None, :], (BLOCK_R, BLOCK_C)), axis=1)
    scale = _by_channel(channel, scale0, scale1, scale2)  # [C]
    centre = _by_channel(channel, centre0, centre1, centre2)  # [C]
    y = (x.to(tl.float32) - centre[None, :]) * scale[None, :]  # [R, C]
    start = tile.to(tl.int64) * (side * row_len)  # [R]
    start += _row_offset(row, row_len, PATCH_H, PATCH_W)
    where = out_ptr + start[:, None] + offset[None, :]
    tl.store(where, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_norm_fwd_resize_kernel(
    tile_ptr,
    first_x_ptr,
    weight_x_ptr,
    first_y_ptr,
    weight_y_ptr,
    out_ptr,
    stride_tn,
    stride_th,
    side,
    row_len,
    row_blocks,
    span,
    scale0,
    scale1,
    scale2,
    centre0,
    centre1,
    centre2,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Resize, crop and standardise BLOCK_R output rows of one tile, BLOCK_C columns of them.

    The `span` input rows that the block needs pass by once: each is resized along its length and
    added to the output rows it touches, so no resized row is ever stored.
    """
    tile = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    is_column = column < row_len  # [C]
    pixel, channel, offset = _place(column, PATCH_H, PATCH_W)  # [C]
    first_x = tl.load(first_x_ptr + pixel, mask=is_column, other=0)  # [C]
    first_y = tl.load(first_y_ptr + block)
    line = tile_ptr + tile.to(tl.int64) * stride_tn + first_y.to(tl.int64) * stride_th
    taps = first_x * 3 + channel  # [C] bytes into a row
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # [R, C]
    weights = weight_y_ptr + block * span * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    for _ in range(span):
        u = tl.zeros((BLOCK_C,), tl.float32)  # [C]
        if UNROLL:
            for s in tl.static_range(TAPS):
                wx = tl.load(weight_x_ptr + s * side + pixel, mask=is_column, other=0.0)  # [C]
                x = tl.load(line + taps + 3 * s, mask=is_column, other=0)  # [C] uint8
                u += wx * x.to(tl.float32)
        else:
            for s in range(TAPS):
                wx = tl.load(weight_x_ptr + s * side + pixel, mask=is_column, other=0.0)  # [C]
                x = tl.load(line + taps + 3 * s, mask=is_column, other=0)  # [C] uint8
                u += wx * x.to(tl.float32)
        u = tl.minimum(tl.maximum(u, 0.0), 255.0)
        acc += tl.load(weights)[:, None] * u[None, :]  # [R, C]
        weights += BLOCK_R
        line += stride_th
    acc = tl.minimum(tl.maximum(acc, 0.0), 255.0)
    scale = _by_channel(channel, scale0, scale1, scale2)  # [C]
    centre = _by_channel(channel, centre0, centre1, centre2)  # [C]
    y = (acc - centre[None, :]) * scale[None, :]  # [R, C]
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    start = tile.to(tl.int64) * (side * row_len) + _row_offset(row, row_len, PATCH_H, PATCH_W)
    where = out_ptr + start[:, None] + offset[None, :]
    mask = (row < side)[:, None] & is_column[None, :]  # [R, C]
    tl.store(where, y.to(out_ptr.dtype.element_ty), mask=mask)


def _affine(mean: Sequence[float], std: Sequence[float]) -> dict[str, float]:
    scale = {f"scale{c}": 1 / (255 * std[c]) for c in range(3)}
    return scale | {f"centre{c}": 255 * mean[c] for c in range(3)}


def _crop_blocks(row_len: int, patches: tuple[int, int] | None, chosen: dict[str, int]) -> None:
    """Give whole rows to a program where the row's bytes change places on chip."""
    if patches is not None:
        cells = chosen["BLOCK_R"] * chosen["BLOCK_C"]
        chosen["BLOCK_C"] = max(triton.next_power_of_2(row_len), 16)
        chosen["BLOCK_R"] = max(cells // chosen["BLOCK_C"], 1)


def launch_tile_norm_fwd_crop(
    window: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patches: tuple[int, int] | None,
    out: Tensor,
) -> None:
    """Standardise the kept pixels.

    Args:
        window: `[n, p, p, 3]` uint8, n > 0; a view of the tiles whose pixels lie side by side.
        mean: Three channel means on the scale 0..1.
        std: Three channel standard deviations on the scale 0..1.
        patches: Height and width of a patch, or None for channels last.
        out: `[n · 3 · p · p]` of a dtype up to float32, in the order asked for; written whole.
    """
    n, side = window.shape[:2]
    chosen = config(OP, "tile_norm_fwd_crop_kernel", window.device)
    _crop_blocks(3 * side, patches, chosen)
    grid = (triton.cdiv(n * side, chosen["BLOCK_R"]), triton.cdiv(3 * side, chosen["BLOCK_C"]))
    patch_h, patch_w = patches or (0, 0)
    tile_norm_fwd_crop_kernel[grid](
        tile_ptr=window,
        out_ptr=out,
        stride_tn=window.stride(0),
        stride_th=window.stride(1),
        num_rows=n * side,
        side=side,
        row_len=3 * side,
        **_affine(mean, std),
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        **chosen,
    )


def resize_block(device: torch.device) -> int:
    """Return how many output rows a program of the resize makes: the block of its row tables."""
    return int(config(OP, "tile_norm_fwd_resize_kernel", device)["BLOCK_R"])


def launch_tile_norm_fwd_resize(
    tiles: Tensor,
    columns: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    patches: tuple[int, int] | None,
    out: Tensor,
) -> None:
    """Resize, crop and standardise.

    Args:
        tiles: `[n, h, w, 3]` uint8, n > 0, pixels of a row side by side.
        columns: `first [p]` int32 and `weight [taps, p]` float32 of the output columns.
        rows: `first [blocks]` int32 and `weight [blocks, span, resize_block]` float32 of blocks of
            output rows. All rows and columns that the tables name lie inside the tile.
        mean: Three channel means on the scale 0..1.
        std: Three channel standard deviations on the scale 0..1.
        patches: Height and width of a patch, or None for channels last.
        out: `[n · 3 · p · p]` of a dtype up to float32, in the order asked for; written whole.
    """
    chosen = config(OP, "tile_norm_fwd_resize_kernel", tiles.device)
    taps, side = columns[1].shape
    blocks, span = rows[1].shape[:2]
    patch_h, patch_w = patches or (0, 0)
    grid = (tiles.shape[0] * blocks, triton.cdiv(3 * side, chosen["BLOCK_C"]))
    tile_norm_fwd_resize_kernel[grid](
        tile_ptr=tiles,
        first_x_ptr=columns[0],
        weight_x_ptr=columns[1],
        first_y_ptr=rows[0],
        weight_y_ptr=rows[1],
        out_ptr=out,
        stride_tn=tiles.stride(0),
        stride_th=tiles.stride(1),
        side=side,
        row_len=3 * side,
        row_blocks=blocks,
        span=span,
        **_affine(mean, std),
        TAPS=taps,
        UNROLL=taps <= MAX_UNROLLED_TAPS,
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        **chosen,
    )


def _spec(
    kernel: str,
    capability: int,
    out: tuple[str, str],
    pointers: dict[str, str],
    numbers: Sequence[str],
    constexprs: dict[str, int],
) -> CompileSpec:
    chosen = dict(shipped(OP)[kernel][str(nearest(capability))])
    options = {k: chosen.pop(k) for k in ("num_warps", "num_stages")}
    constexprs = {**chosen, **constexprs}
    factors = [f"{name}{c}" for name in ("scale", "centre") for c in range(3)]
    return CompileSpec(
        op=OP,
        kernel=kernel,
        capability=capability,
        signature={
            **pointers,
            "out_ptr": out[1],
            **dict.fromkeys(numbers, "i32"),
            **dict.fromkeys(factors, "fp32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        options=options,
        # A tile of 256 px has rows of 768 bytes, the crop to 224 px starts 48 bytes into them.
        aligned=[*pointers, "out_ptr", "stride_tn", "stride_th", "side", "row_len"],
        dtype=out[0],
        has_product=False,
    )


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return what is compiled offline: 256 px cropped to 224, and 256 or 1,024 px resized to 224.

    Channels last in every output dtype, and in patches of 16 x 16 in the half ones.
    """
    number = ["stride_tn", "stride_th", "side", "row_len"]
    crop, resize = "tile_norm_fwd_crop_kernel", "tile_norm_fwd_resize_kernel"
    tables = {"first_x_ptr": "*i32", "weight_x_ptr": "*fp32"}
    tables |= {"first_y_ptr": "*i32", "weight_y_ptr": "*fp32"}
    specs = []
    for out in _OUTPUTS:
        for patches in (None, (16, 16)):
            if patches is not None and out[0] == "fp32":
                continue
            layout = dict(zip(("PATCH_H", "PATCH_W"), patches or (0, 0), strict=True))
            blocks = dict(shipped(OP)[crop][str(nearest(capability))])
            _crop_blocks(3 * 224, patches, blocks)
            shape = {k: blocks[k] for k in ("BLOCK_R", "BLOCK_C")} | layout
            tile = {"tile_ptr": "*u8"}
            specs.append(_spec(crop, capability, out, tile, [*number, "num_rows"], shape))
            # Bicubic has 6 taps from 256 px; 20 from 1,024 px, too many to keep in registers.
            for taps in (6, 20) if patches is None else (6,):
                unroll = {"TAPS": taps, "UNROLL": taps <= MAX_UNROLLED_TAPS} | layout
                numbers = [*number, "row_blocks", "span"]
                specs.append(_spec(resize, capability, out, tile | tables, numbers, unroll))
    return specs
