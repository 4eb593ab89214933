"""Benchmarks of the two attentions over tiles: `dilated_attn` (LongNet) and `alibi_attn` (TITAN).

Rivals of dilated attention gather each branch, run a library's fused attention on it, scatter and
merge by the log-sum-exp: the literal form with the best ordinary calls. Rivals of ALiBi attention
are handed the dense bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.benchmarks.attention_libraries import (
    Attend,
    aten_with_lse,
    flash_attn,
    xformers,
)
from modaltune.benchmarks.kernel_spec import (
    Call,
    OpSpec,
    Rival,
    Run,
    Tensors,
    by_keywords,
    values,
)
from modaltune.kernels import alibi_attention, dilated_attention
from modaltune.kernels.alibi_attn.reference import alibi_attention_reference, alibi_bias
from modaltune.kernels.dilated_attn.reference import (
    NO_ATTENTION,
    branch_shape,
    dilated_attention_reference,
)

SEGMENTS, RATIOS = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)


def _qkv(rows: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {n: values(i, (rows, heads, dim), device, dtype) for i, n in enumerate("qkv")}


def make_dilated(
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int = 16,
    head_dim: int = 48,
    segments: tuple[int, ...] = SEGMENTS,
    ratios: tuple[int, ...] = RATIOS,
) -> Call:
    """Return one slide of `tiles` tiles and a cls token; every ratio divides the heads."""
    rows = tiles + 1
    chosen = {"segment_lengths": segments, "dilation_ratios": ratios}
    sizes = {"lengths": [rows], "heads": heads, "head_dim": head_dim, **chosen}
    return Call(_qkv(rows, heads, head_dim, device, dtype), chosen, sizes)


def _dilated_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    rows, _, dim = tensors["q"].shape
    given: dict[str, Any] = {**tensors, **options}
    return dilated_attention_reference(**given, offsets=torch.tensor([0, rows]), scale=dim**-0.5)


def _dilated_bytes(tiles: int, itemsize: int) -> float:
    """Scores of the widest branch three times (scores, weights, products of both), and tensors."""
    rows, widest = tiles + 1, 0.0
    for segment, ratio in zip(SEGMENTS, RATIOS, strict=True):
        _, n, m = branch_shape(rows, segment, ratio)
        widest = max(widest, float(n) * 16 * m * m)
    return itemsize * (3 * widest + 60.0 * rows * 768)


def branches(attend: Attend, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return dilated attention of one sequence, branch by branch with a library's attention."""
    length, heads, dim = q.shape
    outs, logs = [], []
    chosen = zip(options["segment_lengths"], options["dilation_ratios"], strict=True)
    for segment, ratio in chosen:
        w, n, m = branch_shape(length, segment, ratio)
        group = heads // ratio

        def gather(t: Tensor, w: int, n: int, m: int, ratio: int, group: int) -> Tensor:
            t = F.pad(t, (0, 0, 0, 0, 0, n * w - length)).unflatten(0, (n, w))
            t = F.pad(t, (0, 0, 0, 0, 0, m * ratio - w))
            t = t.view(n, m, ratio, ratio, group, dim).diagonal(dim1=2, dim2=3)
            return t.permute(0, 1, 4, 2, 3).reshape(n, m, heads, dim)

        q_kept, k_kept, v_kept = (gather(t, w, n, m, ratio, group) for t in (q, k, v))
        out, lse = attend(q_kept, k_kept, v_kept, dim**-0.5)
        if lse is None:
            raise TypeError("branches need an attention that returns its log-sum-exp")
        full = out.new_zeros(n, m, ratio, ratio, group, dim)
        full.diagonal(dim1=2, dim2=3).copy_(
            out.view(n, m, ratio, group, dim).permute(0, 1, 3, 4, 2)
        )
        outs.append(full.reshape(n, m * ratio, heads, dim)[:, :w].flatten(0, 1)[:length])
        log = lse.new_full((n, m, ratio, ratio, group), NO_ATTENTION)
        log.diagonal(dim1=2, dim2=3).copy_(
            lse.detach().view(n, ratio, group, m).permute(0, 3, 2, 1)
        )
        logs.append(log.reshape(n, m * ratio, heads)[:, :w].flatten(0, 1)[:length])
    weights = torch.softmax(torch.stack(logs), dim=0).to(q.dtype).unsqueeze(-1)
    merged = weights[0] * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        merged = merged + weight * out
    return merged


def _branch_rival(library: Callable[[Call], Attend], call: Call) -> Run:
    attend = library(call)

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        return branches(attend, tensors["q"], tensors["k"], tensors["v"], options)

    return run


def _aten(call: Call) -> Attend:
    q = call.tensors["q"]
    return aten_with_lse(q.device, q.dtype)


def make_alibi(
    tiles: int, device: torch.device, dtype: torch.dtype, *, heads: int = 12, head_dim: int = 64
) -> Call:
    """Return one slide of `tiles` tiles on a square grid, and a cls token; TITAN's sizes."""
    rows, side = tiles + 1, int(tiles**0.5) + 1
    cell = torch.arange(-1, tiles)
    tensors = {
        **_qkv(rows, heads, head_dim, device, dtype),
        "grid": torch.stack([cell.div(side, rounding_mode="floor"), cell % side], 1).to(device),
        "slopes": torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]).to(device),
    }
    return Call(tensors, {}, {"lengths": [rows], "heads": heads, "head_dim": head_dim})


def _alibi_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    del options
    rows, _, dim = tensors["q"].shape
    return alibi_attention_reference(
        **tensors, offsets=torch.tensor([0, rows]), num_prefix=1, scale=dim**-0.5
    )


def _alibi_bytes(tiles: int, itemsize: int) -> float:
    """Bias in float64 twice, scores and weights; the squares of distances come before."""
    del itemsize
    return 12.0 * (tiles + 1) ** 2 * (2 * 8 + 2 * 8)


def _dense_bias(call: Call) -> Run:
    bias = alibi_bias(call.tensors["grid"], call.tensors["slopes"], 1).to(call.tensors["q"].dtype)

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        q, k, v = (tensors[n].transpose(0, 1).unsqueeze(0) for n in "qkv")
        # A float64 check of the same function needs the bias in its dtype.
        mask = bias.to(q.dtype).unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return run


SPECS = (
    OpSpec(
        op="dilated_attn",
        make=make_dilated,
        ours=by_keywords(dilated_attention),
        reference=_dilated_reference,
        wanted=("q", "k", "v"),
        reference_bytes=_dilated_bytes,
        small={"heads": 4, "head_dim": 8, "segments": (16, 64), "ratios": (1, 4)},
        rivals={
            "ATen flash, branches": Rival(partial(_branch_rival, _aten)),
            "flash-attn, branches": Rival(
                partial(_branch_rival, lambda call: flash_attn()), devices=("cuda",)
            ),
            "xformers, branches": Rival(
                partial(_branch_rival, lambda call: xformers()),
                modes=("forward",),
                devices=("cuda",),
            ),
        },
    ),
    OpSpec(
        op="alibi_attn",
        make=make_alibi,
        ours=by_keywords(alibi_attention),
        reference=_alibi_reference,
        wanted=("q", "k", "v"),
        reference_bytes=_alibi_bytes,
        small={"heads": 2, "head_dim": 8},
        rivals={"SDPA, dense bias": Rival(_dense_bias)},
    ),
)
