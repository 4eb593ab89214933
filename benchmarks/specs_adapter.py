"""Benchmarks of the Modal Adapter's two attentions: `injection` and `extraction`.

Rivals: the same projections as separate library calls around a library's fused attention, and plain
CUDA C++ (`cuda/*.cu`) on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.benchmarks import cuda_baseline
from modaltune.benchmarks.attention_libraries import Attend, flash_attn, sdpa, xformers
from modaltune.benchmarks.kernel_spec import Call, OpSpec, Rival, Run, Tensors, by_keywords, values
from modaltune.kernels import extract, inject
from modaltune.kernels.extraction.reference import extract_reference
from modaltune.kernels.injection.reference import inject_reference

EPS = 1e-5
_INJECT_WANTED = (
    *("x", "keys", "values", "gamma", "norm_weight", "norm_bias"),
    *("query_weight", "query_bias", "output_weight", "output_bias"),
)


def _drawn(
    shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Normal values; weights scaled by their inputs, the scale of the norm near one."""
    drawn = {}
    for i, (name, shape) in enumerate(shapes.items()):
        tensor = values(i, shape, device, torch.float32)
        if name.endswith("_weight") and len(shape) == 2:
            tensor = tensor * shape[1] ** -0.5
        elif name == "norm_weight":
            tensor = 1 + 0.2 * tensor
        drawn[name] = tensor.to(dtype)
    return drawn


def make_injection(
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    width: int = 768,
    inner: int = 192,
    heads: int = 12,
    tokens: int = 65,
) -> Call:
    """Return one slide of `tiles` tiles and its modal tokens."""
    shapes: dict[str, tuple[int, ...]] = {
        "x": (tiles, width),
        "keys": (1, tokens, inner),
        "values": (1, tokens, inner),
        "gamma": (width,),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "query_weight": (inner, width),
        "query_bias": (inner,),
        "output_weight": (width, inner),
        "output_bias": (width,),
    }
    sizes = {"rows": tiles, "cases": 1, "width": width, "inner": inner, "heads": heads}
    sizes |= {"tokens": tokens}
    return Call(_drawn(shapes, device, dtype), {"num_heads": heads}, sizes)


def make_extraction(
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    width: int = 768,
    inner: int = 192,
    heads: int = 12,
    tokens: int = 65,
) -> Call:
    """Return one slide of `tiles` tiles and the queries of its modal tokens."""
    shapes: dict[str, tuple[int, ...]] = {
        "queries": (1, tokens, inner),
        "x": (tiles, width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "kv_weight": (2 * inner, width),
        "kv_bias": (2 * inner,),
    }
    sizes = {"rows": tiles, "cases": 1, "width": width, "inner": inner, "heads": heads}
    sizes |= {"tokens": tokens, "queries": tokens}
    return Call(_drawn(shapes, device, dtype), {"num_heads": heads}, sizes)


def _inject_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    bounds = torch.tensor([0, tensors["x"].shape[0]])
    given: dict[str, Any] = {**tensors, **options}
    return inject_reference(**given, offsets=bounds, num_prefix=0, key_mask=None, eps=EPS)


def _extract_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    bounds = torch.tensor([0, tensors["x"].shape[0]])
    given: dict[str, Any] = {**tensors, **options}
    return extract_reference(**given, offsets=bounds, num_prefix=0, eps=EPS)


def _separate_inject(library: Callable[[], Attend], call: Call) -> Run:
    attend = library()
    del call

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        x, heads = tensors["x"], options["num_heads"]
        normed = F.layer_norm(x, x.shape[-1:], tensors["norm_weight"], tensors["norm_bias"], EPS)
        q = F.linear(normed, tensors["query_weight"], tensors["query_bias"]).unsqueeze(0)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, tensors["keys"], tensors["values"]))
        out = attend(q, k, v, q.shape[-1] ** -0.5)[0].flatten(2)[0]
        out = F.linear(out, tensors["output_weight"], tensors["output_bias"])
        return x + tensors["gamma"] * (x + out)

    return run


def _separate_extract(library: Callable[[], Attend], call: Call) -> Run:
    attend = library()
    del call

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        x, heads = tensors["x"], options["num_heads"]
        normed = F.layer_norm(x, x.shape[-1:], tensors["norm_weight"], tensors["norm_bias"], EPS)
        kv = F.linear(normed, tensors["kv_weight"], tensors["kv_bias"]).unsqueeze(0)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (tensors["queries"], *kv.chunk(2, dim=-1)))
        return attend(q, k, v, q.shape[-1] ** -0.5)[0].flatten(2)

    return run


def _rivals(separate: Callable[..., Run], baseline: Callable[[Call], Run]) -> dict[str, Rival]:
    return {
        "SDPA, separate": Rival(partial(separate, sdpa)),
        "flash-attn, separate": Rival(partial(separate, flash_attn), devices=("cuda",)),
        "xformers, separate": Rival(
            partial(separate, xformers), modes=("forward",), devices=("cuda",)
        ),
        "CUDA C++": Rival(baseline, modes=("forward",), devices=("cuda",)),
    }


def _bytes(tiles: int, itemsize: int) -> float:
    """Rows three times, projections and output, scores twice."""
    return float(itemsize) * tiles * (4 * 768 + 4 * 192 + 3 * 12 * 65)


SPECS = (
    OpSpec(
        op="injection",
        make=make_injection,
        ours=by_keywords(inject),
        reference=_inject_reference,
        wanted=_INJECT_WANTED,
        reference_bytes=_bytes,
        rivals=_rivals(_separate_inject, cuda_baseline.build_inject),
        small={"width": 64, "inner": 32, "heads": 2, "tokens": 5},
    ),
    OpSpec(
        op="extraction",
        make=make_extraction,
        ours=by_keywords(extract),
        reference=_extract_reference,
        wanted=("queries", "x", "norm_weight", "norm_bias", "kv_weight", "kv_bias"),
        reference_bytes=_bytes,
        rivals=_rivals(_separate_extract, cuda_baseline.build_extract),
        small={"width": 64, "inner": 32, "heads": 2, "tokens": 5},
    ),
)
