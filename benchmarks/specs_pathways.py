"""Benchmark of the pathway networks, `grouped_mlp`: 331 of them, for 1 case and for 32.

Rivals: every pathway padded to the largest and two batched products; and `torch._grouped_mm`, which
needs each group padded to eight genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.benchmarks.kernel_spec import (
    Call,
    NotHereError,
    OpSpec,
    Rival,
    Run,
    Tensors,
    by_keywords,
    values,
)
from modaltune.kernels import pathway_mlp
from modaltune.kernels.grouped_mlp.reference import pathway_mlp_reference
from modaltune.published_size import GENES, PATHWAYS, pathway_layout

_ALIGNED = 8  # genes: 16 bytes in half precision, where a group's rows must begin


def make_pathways(
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cases: int,
    width: int = 256,
    pathways: int = PATHWAYS,
) -> Call:
    """Return `cases` expression vectors and the first of the published pathways; no tiles."""
    del tiles
    index, offsets = pathway_layout()
    index, offsets = index[: int(offsets[pathways])], offsets[: pathways + 1]
    members = index.numel()
    tensors = {
        "expression": values(0, (cases, GENES), device, dtype),
        "gene_index": index.to(device),
        "weight1": values(1, (members, width), device, dtype, 0.2),
        "bias1": values(2, (pathways, width), device, dtype, 0.2),
        "weight2": values(3, (pathways, width, width), device, dtype, width**-0.5),
        "bias2": values(4, (pathways, width), device, dtype, 0.2),
    }
    sizes = {"cases": cases, "width": width, "pathways": pathways, "memberships": members}
    return Call(tensors, {"offsets": offsets}, {**sizes, "genes": GENES, "offsets": offsets})


def _reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    return pathway_mlp_reference(**tensors, **options, dropout_p=0.0, seed=0)


def _bytes(tiles: int, itemsize: int, *, cases: int) -> float:
    del tiles
    return float(itemsize) * 331 * 256 * (4 * cases + 2 * 256)


def _slots(offsets: Tensor, multiple: int | None) -> tuple[Tensor, Tensor]:
    """Return where each membership goes when pathways are padded, and the padded offsets.

    Args:
        offsets: `[P + 1]` int64.
        multiple: Pathways grow to a multiple of this, or all to the largest where None.
    """
    counts = offsets.diff()
    if multiple is None:
        padded = torch.full_like(counts, int(counts.max()))
    else:
        padded = (counts + multiple - 1) // multiple * multiple
    bounds = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    starts = torch.repeat_interleave(bounds[:-1] - offsets[:-1], counts)
    return starts + torch.arange(int(offsets[-1])), bounds


def _second_layer(hidden: Tensor, tensors: Tensors) -> Tensor:
    """ELU, then `[P, B, d]` through each pathway's second layer to `[B, P, d]`."""
    hidden = F.elu(hidden + tensors["bias1"].unsqueeze(1))
    out = torch.baddbmm(tensors["bias2"].unsqueeze(1), hidden, tensors["weight2"].transpose(1, 2))
    return F.elu(out).transpose(0, 1)


def _padded(call: Call) -> Run:
    offsets = call.options["offsets"]
    slots, bounds = _slots(offsets, None)
    slots = slots.to(call.tensors["weight1"].device)
    pathways, widest = offsets.numel() - 1, int(bounds[1])

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        expression, weight = tensors["expression"], tensors["weight1"]
        genes = expression.new_zeros(expression.shape[0], pathways * widest)
        genes = genes.index_copy(1, slots, expression[:, tensors["gene_index"]])
        wide = weight.new_zeros(pathways * widest, weight.shape[1]).index_copy(0, slots, weight)
        genes = genes.unflatten(1, (pathways, widest)).transpose(0, 1)
        return _second_layer(torch.bmm(genes, wide.unflatten(0, (pathways, widest))), tensors)

    return run


def _grouped(call: Call) -> Run:
    operator = getattr(torch, "_grouped_mm", None)
    weight = call.tensors["weight1"]
    if operator is None:
        raise NotHereError("this torch has no _grouped_mm; install torch>=2.9")
    if weight.device.type == "cuda":
        if weight.dtype != torch.bfloat16:
            raise NotHereError(f"takes bfloat16 on CUDA, got {weight.dtype}")
        if torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise NotHereError("needs compute capability 8.0")
    slots, bounds = _slots(call.options["offsets"], _ALIGNED)
    slots, total = slots.to(weight.device), int(bounds[-1])
    ends = bounds[1:].to(weight.device, torch.int32)

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        expression, weight = tensors["expression"], tensors["weight1"]
        genes = expression.new_zeros(expression.shape[0], total)
        genes = genes.index_copy(1, slots, expression[:, tensors["gene_index"]])
        wide = weight.new_zeros(total, weight.shape[1]).index_copy(0, slots, weight)
        return _second_layer(operator(genes, wide, offs=ends), tensors)

    return run


SPECS = tuple(
    OpSpec(
        op="grouped_mlp",
        variant=f"{cases} case" + ("s" if cases > 1 else ""),
        make=partial(make_pathways, cases=cases),
        ours=by_keywords(pathway_mlp),
        reference=_reference,
        wanted=("weight1", "bias1", "weight2", "bias2"),
        reference_bytes=partial(_bytes, cases=cases),
        rivals={
            "padded, bmm": Rival(_padded),
            "torch._grouped_mm": Rival(_grouped, modes=("forward",)),
        },
        most_tiles=0,
        small={"width": 16, "pathways": 30},
    )
    for cases in (1, 32)
)
