"""Patch embedding epilogue on the GPU: one read of the tiles, one write of the sequence.

    out = [cls; x_1 + p_1; x_2 + p_2; ...] per case
    p = [sin(j w), cos(j w), sin(i w), cos(i w)]    w_k = 10000^(-k / Q), k = 0 .. Q - 1, Q = D / 4

for a tile in cell (i, j). Angles are reduced exactly, in integers: with F_k = w_k / (2 pi) turns a
cell as a 64-bit fraction, the wrapping product cell * F_k is the fraction of a turn, off by at most
|cell| / 2^65 turns. Its top 32 bits give the nearest quarter and a rest r of at most 1/8 turn. The
rest is turned to radians in two float32 parts, t + e, and

    sin = t + (e + a^3 S(a^2))    cos = 1 - (t^2 / 2 + e (t + e / 2) - a^4 C(a^2))    a = t + e

with polynomials S and C; quarters swap and negate them. No library function and no float64 is
needed; every value is within 8e-8 of the float64 one (a float32 step below 1 is 6e-8). Sums are
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._schedule import row_blocks
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.resources import CompileSpec

OP = "position_embed"
MAX_PERIOD = 10000.0
# Radians per 2^-32 turn times 2^17, in parts of 12 bits whose products with a 12-bit rest are
# exact, and what is left of it.
_UNIT = 2.0**17 * 2 * math.pi / 2.0**32
_FINE = 2.0 ** (math.frexp(_UNIT)[1] - 12)
_TOP = math.floor(_UNIT / _FINE) * _FINE
_NEXT = math.floor((_UNIT - _TOP) / (_FINE * 2.0**-12)) * _FINE * 2.0**-12
TOP, NEXT = tl.constexpr(_TOP), tl.constexpr(_NEXT)
REST = tl.constexpr(_UNIT - _TOP - _NEXT)
SMALL = tl.constexpr(_UNIT / 2.0**17)
# Taylor coefficients: what is cut off is below 4e-9 for angles up to pi / 4.
S3, S5, S7, S9 = (tl.constexpr((-1) ** (n // 2) / math.factorial(n)) for n in (3, 5, 7, 9))
C4, C6, C8 = (tl.constexpr(-((-1) ** (n // 2)) / math.factorial(n)) for n in (4, 6, 8))
C10 = tl.constexpr(1 / math.factorial(10))

Allocate = Callable[..., Tensor]


@triton.jit
def _waves(cells, turns):
    """Sin and cos of some cells [L] at some frequencies [Q], in turns per cell, as [L, Q]."""
    phase = ((cells[:, None] * turns[None, :]) >> 32).to(tl.int32)  # [L, Q], 2^-32 turns
    quarter = (phase + (1 << 29)) >> 30  # [L, Q], -2 .. 1; the sum wraps at half a turn
    rest = phase - (quarter << 30)  # [L, Q], -2^29 .. 2^29 - 1
    high = rest >> 17  # [L, Q], 12 bits and a sign
    low = (rest - (high << 17)).to(tl.float32)  # [L, Q], 0 .. 2^17 - 1
    high = high.to(tl.float32)
    t = high * TOP  # [L, Q], exact
    e = high * NEXT + (high * REST + low * SMALL)  # [L, Q]
    # The small terms may take the rounded angle.
    angle = t + e
    s = angle * angle
    sine = t + (e + angle * s * (S3 + s * (S5 + s * (S7 + s * S9))))
    cosine = 1.0 - (
        (0.5 * (t * t) + e * (t + 0.5 * e)) + s * s * (C4 + s * (C6 + s * (C8 + s * C10)))
    )
    is_swapped = (quarter & 1) != 0
    first = tl.where(is_swapped, cosine, sine)
    second = tl.where(is_swapped, sine, cosine)
    is_back = (quarter & 2) != 0  # the third and fourth quarter of the sine
    is_left = ((quarter + 1) & 2) != 0  # the second and third: the cosine is negative
    return tl.where(is_back, -first, first), tl.where(is_left, -second, second)


@triton.jit
def _add(x_ptr, cls_ptr, out_ptr, source, target, column, wave, is_tile, is_row, is_k, UPCAST):
    """Write a wave plus the tiles' columns, or the cls token's where a row is no tile."""
    mask = is_row[:, None] & is_k[None, :]
    tile = tl.load(x_ptr + source[:, None] + column[None, :], mask=mask & is_tile[:, None], other=0)
    cls = tl.load(cls_ptr + column, mask=is_k, other=0.0)  # [Q]
    if UPCAST:
        tile, cls = tile.to(tl.float32), cls.to(tl.float32)
    placed = tl.where(is_tile[:, None], tile.to(tl.float32) + wave, cls.to(tl.float32)[None, :])
    at = out_ptr + target[:, None] + column[None, :]  # [L, Q]
    tl.store(at, placed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def position_embed_fwd_kernel(
    x_ptr, cells_ptr, cls_ptr, turns_ptr, work_ptr,
    out_ptr,
    stride_xn, stride_cn, stride_cc,
    QUARTER: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_L rows of one case's sequence, its cls row among them, at BLOCK_Q frequencies."""
    listed = work_ptr + tl.program_id(0) * 4
    first, begin, end = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    case = tl.load(listed + 3)
    rows = first + tl.arange(0, BLOCK_L)  # [L], of the output
    is_row, is_tile = rows < end, (rows < end) & (rows > begin)
    tiles = tl.maximum(rows - case - 1, 0).to(tl.int64)  # [L], of the input
    k = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [Q]
    is_k = k < QUARTER
    turns = tl.load(turns_ptr + k, mask=is_k, other=0)  # [Q]
    source = tiles * stride_xn  # [L]
    target = rows.to(tl.int64) * (4 * QUARTER)  # [L]
    for axis in tl.static_range(2):  # the second coordinate comes first
        at = cells_ptr + tiles * stride_cn + (1 - axis) * stride_cc  # [L]
        cells = tl.load(at, mask=is_tile, other=0).to(tl.int64)
        sine, cosine = _waves(cells, turns)  # [L, Q] each
        column = 2 * axis * QUARTER + k  # [Q]
        _add(x_ptr, cls_ptr, out_ptr, source, target, column, sine, is_tile, is_row, is_k, UPCAST)
        column += QUARTER
        _add(x_ptr, cls_ptr, out_ptr, source, target, column, cosine, is_tile, is_row, is_k, UPCAST)


@lru_cache(maxsize=16)
def turns_per_cell(quarter: int, device: torch.device) -> Tensor:
    """Return `[quarter]` int64: w_k / (2 pi) as a 64-bit fraction of a turn, rounded.

    A float64 holds 53 bits of it, so w_k is off by 2^-54 of itself, as in the reference.
    """
    fractions = [MAX_PERIOD ** -(k / quarter) / (2 * math.pi) for k in range(quarter)]
    # Below 1/6 turn: bit 63, the sign, is clear.
    return torch.tensor([round(math.ldexp(f, 64)) for f in fractions], device=device)


@lru_cache(maxsize=64)
def work_list(offsets: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return `[n, 4]` int32 per block of output rows: first row; its case's first row, end, number.

    Kept per layout: a captured CUDA graph copies nothing.
    """
    rows = torch.tensor(offsets, dtype=torch.int64, device="cpu")
    rows += torch.arange(len(offsets), device="cpu")
    blocks = row_blocks(rows, block)
    begin = rows[:-1].to(torch.int32)[blocks.case.long()]
    return torch.stack([blocks.start, begin, blocks.end, blocks.case], dim=1).to(device)


def _variant(dtype: torch.dtype) -> str:
    return ".fp32" if dtype == torch.float32 else ""


def launch_position_embed_fwd(
    x: Tensor, cells: Tensor, cls_token: Tensor, offsets: Tensor, empty: Allocate = torch.empty
) -> Tensor:
    """Return `[N + B, D]`. Arguments as in `embed_positions`, checked.

    `empty` allocates the output like `torch.empty` (tests put guards around it).
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    quarter = x.shape[1] // 4
    chosen = config(OP, "position_embed_fwd_kernel" + _variant(x.dtype), x.device)
    chosen["BLOCK_Q"] = min(chosen["BLOCK_Q"], max(16, triton.next_power_of_2(quarter)))
    work = work_list(tuple(offsets.tolist()), chosen["BLOCK_L"], x.device)
    rows = x.shape[0] + offsets.numel() - 1
    out = empty((rows, x.shape[1]), dtype=x.dtype, device=x.device)
    if rows and quarter:
        grid = (work.shape[0], triton.cdiv(quarter, chosen["BLOCK_Q"]))
        position_embed_fwd_kernel[grid](
            x_ptr=x,
            cells_ptr=cells,
            cls_ptr=cls_token.to(x.dtype).reshape(-1).contiguous(),
            turns_ptr=turns_per_cell(quarter, x.device),
            work_ptr=work,
            out_ptr=out,
            stride_xn=x.stride(0),
            stride_cn=cells.stride(0),
            stride_cc=cells.stride(1),
            QUARTER=quarter,
            UPCAST=needs_upcast(x.dtype),
            **chosen,
        )
    return out


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return the kernel in every shipped configuration for a compute capability."""
    return [_spec(capability, "bf16", torch.bfloat16), _spec(capability, "fp32", torch.float32)]


def _spec(capability: int, name: str, dtype: torch.dtype) -> CompileSpec:
    kernel: Any = position_embed_fwd_kernel
    chosen = dict(shipped(OP)[kernel.__name__ + _variant(dtype)][str(capability)])
    chosen |= {"QUARTER": 192, "UPCAST": False}
    types = {"cells_ptr": "*i64", "turns_ptr": "*i64", "work_ptr": "*i32"}
    return CompileSpec(
        op=OP,
        kernel=kernel.__name__,
        capability=capability,
        signature={
            n: "constexpr" if n.isupper() else types.get(n, f"*{name}" if "ptr" in n else "i32")
            for n in kernel.arg_names
        },
        constexprs={n: chosen[n] for n in kernel.arg_names if n.isupper()},
        options={n: chosen[n] for n in ("num_warps", "num_stages")},
        aligned=[n for n in kernel.arg_names if n.endswith("_ptr") or n == "stride_xn"],
        dtype=name,
        has_product=False,
    )
