"""Launchers of the injector's Triton kernels, and what is compiled offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._schedule import row_blocks
from modaltune.kernels._tuning import config, nearest, shipped
from modaltune.kernels.injection.triton_backward import (
    inject_bwd_attention_kernel,
    inject_bwd_input_kernel,
    inject_bwd_project_kernel,
    inject_bwd_weights_kernel,
)
from modaltune.kernels.injection.triton_forward import inject_fwd_fold_kernel, inject_fwd_kernel
from modaltune.kernels.resources import CompileSpec

OP = "injection"
# Returns uninitialised memory of a shape and dtype; tests hand in one that adds guards around it.
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
HALF = (torch.float16, torch.bfloat16)
GRADIENTS = (
    "x",
    "keys",
    "values",
    "gamma",
    "norm_weight",
    "norm_bias",
    "query_weight",
    "query_bias",
    "output_weight",
    "output_bias",
)


class Folded(NamedTuple):
    """The weights as the kernels want them; E is padded, head by head.

    Attributes:
        query: `[E, D]` query weight times the LayerNorm's scale.
        query_sum: `[E]` float32 row sums of `query`.
        query_shift: `[E]` float32 query of the LayerNorm's shift.
        output: `[E, D]` output weight, transposed.
    """

    query: Tensor
    query_sum: Tensor
    query_shift: Tensor
    output: Tensor


def _two_powers(count: int) -> tuple[int, int]:
    """Return two powers of two (the second may be 0) whose sum is the least to hold `count`."""
    main = 1 << (count.bit_length() - 1)
    tail = triton.next_power_of_2(count - main) if count > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


def shape_of(width: int, inner: int, num_heads: int, tokens: int) -> dict[str, int]:
    """Return the constexprs that describe a call: padded heads and keys in two tiles each."""
    head_dim = inner // num_heads
    head_pad = max(16, triton.next_power_of_2(head_dim))
    main, tail = _two_powers(num_heads)
    keys_main, keys_tail = _two_powers(max(1, -(-tokens // 16)))
    return {
        "WIDTH": width,
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": head_pad,
        "MAIN": main * head_pad,
        "TAIL": tail * head_pad,
        "INNER": (main + tail) * head_pad,
        "KEYS_MAIN": 16 * keys_main,
        "KEYS_TAIL": 16 * keys_tail,
    }


def _launch(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
    """Run a kernel with those of the options that it takes, unless the grid is empty."""
    if all(grid):
        taken = {"num_warps", "num_stages", *kernel.arg_names}
        kernel[grid](**arguments, **{k: v for k, v in options.items() if k in taken})


def _options(kernel: str, x: Tensor, shape: dict[str, int]) -> dict[str, Any]:
    """Return configuration, shape and precision of a launch."""
    name = kernel if x.dtype in HALF else f"{kernel}.fp32"
    return {
        **config(OP, name, x.device),
        **shape,
        "UPCAST": needs_upcast(x.dtype),
        "PRECISION": "ieee",
    }


@lru_cache(maxsize=64)
def _blocks(offsets: tuple[int, ...], block: int, num_prefix: int, device: torch.device) -> Tensor:
    """Return `[n, 4]` int32: case, first row, end of the case, its first row after the prefix."""
    bounds = torch.tensor(offsets, device="cpu")
    blocks = row_blocks(bounds, block)
    tiles = torch.minimum(bounds[:-1] + num_prefix, bounds[1:]).to(torch.int32)
    case = blocks.case.long()
    return torch.stack([blocks.case, blocks.start, blocks.end, tiles[case]], dim=1).to(device)


@lru_cache(maxsize=64)
def _spans(
    offsets: tuple[int, ...], rows: int, num_prefix: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `[n, 3]` int32 (case, first row, end) and `[B]` spans of each case."""
    blocks = row_blocks(torch.tensor(offsets, device="cpu"), rows, num_prefix)
    end = torch.minimum(blocks.end, blocks.start + rows)
    items = torch.stack([blocks.case, blocks.start, end], dim=1)
    return items.to(device), blocks.first.diff().to(device)


@lru_cache(maxsize=64)
def _plain_bias(tokens: int, padded: int, device: torch.device) -> Tensor:
    bias = torch.full((1, padded), -torch.inf, device="cpu")
    bias[:, :tokens] = 0.0
    return bias.to(device)


def _key_bias(keys: Tensor, key_mask: Tensor | None, shape: dict[str, int]) -> Tensor:
    """Return float32 `[B, keys]` (or one row for all cases): 0 for a shown key, -inf otherwise."""
    padded = shape["KEYS_MAIN"] + shape["KEYS_TAIL"]
    cases, tokens = keys.shape[:2]
    if key_mask is None:
        return _plain_bias(tokens, padded, keys.device)
    bias = torch.full((cases, padded), -torch.inf, device=keys.device)
    bias[:, :tokens].masked_fill_(key_mask, 0.0)
    return bias


def _case_stride(bias: Tensor) -> int:
    return bias.stride(0) if bias.shape[0] > 1 else 0


def _rows_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _allocator(x: Tensor, allocate: Allocate | None) -> Allocate:
    if allocate is not None:
        return allocate
    return lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=x.device)


def _fold(
    x: Tensor, weights: Sequence[Tensor], shape: dict[str, int], allocate: Allocate
) -> Folded:
    """Fold norm weight and bias into query weight and bias, and transpose the output weight."""
    norm_weight, norm_bias, query_weight, query_bias, output_weight = (
        w.contiguous() for w in weights
    )
    inner, width = shape["INNER"], shape["WIDTH"]
    sums, shift = (allocate((inner,), torch.float32) for _ in range(2))
    query, output = (allocate((inner, width), x.dtype) for _ in range(2))
    folded = Folded(query, sums, shift, output)
    options = _options("inject_fwd_fold_kernel", x, shape)
    options["BLOCK_D"] = triton.next_power_of_2(width)
    _launch(
        inject_fwd_fold_kernel,
        (triton.cdiv(inner, options["BLOCK_E"]),),
        options,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        query_weight_ptr=query_weight,
        query_bias_ptr=query_bias,
        output_weight_ptr=output_weight,
        query_ptr=folded.query,
        query_sum_ptr=folded.query_sum,
        query_shift_ptr=folded.query_shift,
        output_ptr=folded.output,
    )
    return folded


def launch_inject_fwd(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
    allocate: Allocate | None = None,
) -> Tensor:
    """Return `[N, D]`; arguments as in `inject`, `offsets` on the CPU."""
    allocate = _allocator(x, allocate)
    out = allocate(x.shape, x.dtype)
    if not x.numel():
        return out
    shape = shape_of(x.shape[1], keys.shape[2], num_heads, keys.shape[1])
    options = _options("inject_fwd_kernel", x, shape)
    with torch.cuda.device_of(x):
        x, keys, values = _rows_together(x), _rows_together(keys), _rows_together(values)
        weights = (norm_weight, norm_bias, query_weight, query_bias, output_weight)
        folded = _fold(x, weights, shape, allocate)
        bias = _key_bias(keys, key_mask, shape)
        work = _blocks(tuple(offsets.tolist()), options["BLOCK_L"], num_prefix, x.device)
        _launch(
            inject_fwd_kernel,
            (work.shape[0],),
            options,
            x_ptr=x,
            keys_ptr=keys,
            values_ptr=values,
            key_bias_ptr=bias,
            work_ptr=work,
            **{f"{name}_ptr": t for name, t in folded._asdict().items()},
            output_bias_ptr=output_bias.contiguous(),
            gamma_ptr=gamma.contiguous(),
            out_ptr=out,
            stride_xn=x.stride(0),
            stride_kb=keys.stride(0),
            stride_kg=keys.stride(1),
            stride_vb=values.stride(0),
            stride_vg=values.stride(1),
            stride_bb=_case_stride(bias),
            stride_bh=0,
            stride_on=out.stride(0),
            eps=eps,
            scale=shape["HEAD_DIM"] ** -0.5,
        )
    return out


@dataclass
class _Backward:
    """What the launches of one backward pass share."""

    x: Tensor
    grad: Tensor
    keys: Tensor
    values: Tensor
    gamma: Tensor
    folded: Folded
    bias: Tensor
    shape: dict[str, int]
    offsets: tuple[int, ...]
    num_prefix: int
    eps: float
    allocate: Allocate

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and do, `[N, E]` each, and mean and rstd of the rows, `[2, N]` float32."""
        x, rows = self.x, self.x.shape[0]
        options = _options("inject_bwd_project_kernel", x, self.shape)
        q, grad_o = (self.allocate((rows, self.shape["INNER"]), x.dtype) for _ in range(2))
        statistics = self.allocate((2, rows), torch.float32)
        for source, weight, out in (
            (x, self.folded.query, q),
            (self.grad, self.folded.output, grad_o),
        ):
            _launch(
                inject_bwd_project_kernel,
                (triton.cdiv(rows, options["BLOCK_L"]),),
                {**options, "STATISTICS": source is x},
                rows_ptr=source,
                factor_ptr=self.gamma,
                weight_ptr=weight,
                sum_ptr=self.folded.query_sum,
                shift_ptr=self.folded.query_shift,
                out_ptr=out,
                statistics_ptr=statistics,
                stride_rn=source.stride(0),
                num_rows=rows,
                eps=self.eps,
            )
        return q, grad_o, statistics

    def attention(self, q: Tensor, grad_o: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Return o and dq `[N, E]`, dk and dv `[B, keys, E]` and the column sums of dq `[E]`."""
        options = _options("inject_bwd_attention_kernel", q, self.shape)
        span, lengths = _spans(self.offsets, options["SPAN"], self.num_prefix, q.device)
        inner = self.shape["INNER"]
        tokens = self.shape["KEYS_MAIN"] + self.shape["KEYS_TAIL"]
        o, grad_q = (self.allocate(q.shape, q.dtype) for _ in range(2))
        partial = [self.allocate((len(span), tokens, inner), torch.float32) for _ in range(2)]
        shift = self.allocate((len(span), inner), torch.float32)
        slots = inner // self.shape["HEAD_PAD"]
        _launch(
            inject_bwd_attention_kernel,
            (len(span), slots),
            options,
            q_ptr=q,
            grad_o_ptr=grad_o,
            keys_ptr=self.keys,
            values_ptr=self.values,
            key_bias_ptr=self.bias,
            span_ptr=span,
            o_ptr=o,
            grad_q_ptr=grad_q,
            grad_keys_ptr=partial[0],
            grad_values_ptr=partial[1],
            grad_shift_ptr=shift,
            stride_kb=self.keys.stride(0),
            stride_kg=self.keys.stride(1),
            stride_vb=self.values.stride(0),
            stride_vg=self.values.stride(1),
            stride_bb=_case_stride(self.bias),
            scale=self.shape["HEAD_DIM"] ** -0.5,
        )
        by_case = [
            torch.segment_reduce(t, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)
            for t in partial
        ]
        return o, grad_q, by_case, shift.sum(0)

    def input(self, q: Tensor, grad_q: Tensor, statistics: Tensor) -> Tensor:
        """Return dx `[N, D]`."""
        options = _options("inject_bwd_input_kernel", q, self.shape)
        work = _blocks(self.offsets, options["BLOCK_L"], self.num_prefix, q.device)
        out = self.allocate(self.x.shape, self.x.dtype)
        _launch(
            inject_bwd_input_kernel,
            (work.shape[0],),
            options,
            x_ptr=self.x,
            grad_ptr=self.grad,
            q_ptr=q,
            grad_q_ptr=grad_q,
            statistics_ptr=statistics,
            gamma_ptr=self.gamma,
            query_ptr=self.folded.query,
            query_sum_ptr=self.folded.query_sum,
            query_shift_ptr=self.folded.query_shift,
            key_bias_ptr=self.bias,
            work_ptr=work,
            grad_x_ptr=out,
            stride_xn=self.x.stride(0),
            stride_un=self.grad.stride(0),
            stride_bb=_case_stride(self.bias),
            stride_gn=out.stride(0),
            num_rows=self.x.shape[0],
        )
        return out

    def sums(self, inner: Tensor, statistics: Tensor, *, query: bool) -> tuple[Tensor, Tensor]:
        """Return T `[E, D]` of dq, or M of o, and r and t `[2, D]` (undefined for T)."""
        options = _options("inject_bwd_weights_kernel", inner, self.shape)
        span, _ = _spans(self.offsets, options["SPAN"], self.num_prefix, inner.device)
        width = self.x.shape[1]
        sums = self.allocate((len(span), inner.shape[1], width), torch.float32)
        columns = self.allocate((0 if query else len(span), 2, width), torch.float32)
        _launch(
            inject_bwd_weights_kernel,
            (len(span), triton.cdiv(width, options["BLOCK_D"])),
            {**options, "QUERY": query},
            x_ptr=self.x,
            grad_ptr=self.grad,
            inner_ptr=inner,
            statistics_ptr=statistics,
            key_bias_ptr=self.bias,
            span_ptr=span,
            sums_ptr=sums,
            column_sums_ptr=columns,
            stride_xn=self.x.stride(0),
            stride_un=self.grad.stride(0),
            stride_bb=_case_stride(self.bias),
            num_rows=self.x.shape[0],
        )
        return sums.sum(0), columns.sum(0)

    def heads(self, padded: Tensor, axis: int) -> Tensor:
        """Take the padding out of an axis of E."""
        heads, head_dim, head_pad = (self.shape[n] for n in ("HEADS", "HEAD_DIM", "HEAD_PAD"))
        by_head = padded.unflatten(axis, (-1, head_pad))
        return by_head.narrow(axis, 0, heads).narrow(axis + 1, 0, head_dim).flatten(axis, axis + 1)


def launch_inject_bwd(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
    needs: Sequence[bool],
    allocate: Allocate | None = None,
) -> list[Tensor]:
    """Return the gradients that are needed, in the order of the tensors `x` to `output_bias`."""
    shape = shape_of(x.shape[1], keys.shape[2], num_heads, keys.shape[1])
    allocate = _allocator(x, allocate)
    need = dict(zip(GRADIENTS, needs, strict=True))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        weights = (norm_weight, norm_bias, query_weight, query_bias, output_weight)
        run = _Backward(
            x=_rows_together(x),
            grad=_rows_together(grad),
            keys=_rows_together(keys),
            values=_rows_together(values),
            gamma=gamma.contiguous(),
            folded=_fold(x, weights, shape, allocate),
            bias=_key_bias(keys, key_mask, shape),
            shape=shape,
            offsets=tuple(offsets.tolist()),
            num_prefix=num_prefix,
            eps=eps,
            allocate=allocate,
        )
        q, grad_o, statistics = run.project()
        o, grad_q, by_case, shift = run.attention(q, grad_o)
        found = dict(zip(("keys", "values"), (t[:, : keys.shape[1]] for t in by_case), strict=True))
        found = {name: run.heads(t, 2) for name, t in found.items()}
        if need["x"]:
            found["x"] = run.input(q, grad_q, statistics)
        found["query_bias"] = shift = run.heads(shift, 0)
        query, scale = query_weight.float(), gamma.float()
        if need["norm_bias"]:
            found["norm_bias"] = (query * shift[:, None]).sum(0)
        if need["norm_weight"] or need["query_weight"]:
            summed = run.heads(run.sums(grad_q, statistics, query=True)[0], 0)
            found["norm_weight"] = (query * summed).sum(0)
            summed = summed * norm_weight.float()
            found["query_weight"] = summed + shift[:, None] * norm_bias.float()
        if need["gamma"] or need["output_weight"] or need["output_bias"]:
            summed, (plain, times_x) = run.sums(o, statistics, query=False)
            summed = run.heads(summed, 0).t()
            found["gamma"] = times_x + (output_weight.float() * summed).sum(1)
            found["gamma"] += output_bias.float() * plain
            found["output_weight"] = scale[:, None] * summed
            found["output_bias"] = scale * plain
        return [found[name].to(x.dtype).contiguous() for name, needed in need.items() if needed]


# Triton types of the tensors that do not have the dtype of x.
_POINTERS = {"work_ptr": "*i32", "span_ptr": "*i32"} | dict.fromkeys(
    (
        *("key_bias_ptr", "query_sum_ptr", "query_shift_ptr", "sum_ptr", "shift_ptr"),
        *("statistics_ptr", "grad_keys_ptr", "grad_values_ptr", "grad_shift_ptr"),
        *("sums_ptr", "column_sums_ptr"),
    ),
    "*fp32",
)
# Products are compiled in bfloat16 for every GPU (float16 differs in the type of an instruction),
# the kernel without one and float32, whose configuration is one for all, for the tightest GPU.
_TIGHTEST = 120
_PRODUCTS: tuple[tuple[Any, dict[str, bool]], ...] = (
    (inject_fwd_kernel, {}),
    (inject_bwd_project_kernel, {"STATISTICS": True}),
    (inject_bwd_project_kernel, {"STATISTICS": False}),
    (inject_bwd_attention_kernel, {}),
    (inject_bwd_input_kernel, {}),
    (inject_bwd_weights_kernel, {"QUERY": False}),
)


def _spec(kernel: Any, capability: int, dtype: str, variant: dict[str, bool]) -> CompileSpec:
    name, names = kernel.fn.__name__, kernel.arg_names
    key = name if dtype != "fp32" else f"{name}.fp32"
    options = {"BLOCK_D": 1024, **shipped(OP)[key][str(nearest(capability))]}
    known: dict[str, Any] = {**options, **shape_of(768, 192, 12, 65), **variant}
    known |= {"UPCAST": False, "PRECISION": "ieee"}

    def kind(argument: str) -> str:
        if argument in known:
            return "constexpr"
        if argument.endswith("_ptr"):
            return _POINTERS.get(argument, f"*{dtype}")
        return "fp32" if argument in ("eps", "scale") else "i32"

    return CompileSpec(
        op=OP,
        kernel=name,
        capability=capability,
        signature={n: kind(n) for n in names},
        constexprs={n: known[n] for n in names if n in known},
        options={n: options[n] for n in ("num_warps", "num_stages")},
        aligned=[n for n in names if n.endswith("_ptr") or n.startswith("stride")],
        dtype=dtype,
        has_product=kernel is not inject_fwd_fold_kernel,
    )


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return what is compiled offline: the published shape, 65 keys."""
    specs = [_spec(kernel, capability, "bf16", variant) for kernel, variant in _PRODUCTS]
    if capability == _TIGHTEST:
        specs += [_spec(inject_fwd_fold_kernel, capability, t, {}) for t in ("bf16", "fp32")]
        specs.append(_spec(inject_bwd_weights_kernel, capability, "bf16", {"QUERY": True}))
        specs += [_spec(k, capability, "fp32", v) for k, v in _PRODUCTS]
    return specs
