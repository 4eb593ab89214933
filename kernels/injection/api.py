"""Injector: tiles attend to modal tokens, gated into the slide encoder's stream."""

from __future__ import annotations

import torch
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
from modaltune.kernels.injection import ops
from modaltune.kernels.injection.reference import inject_reference


def _check(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    weights: tuple[Tensor, ...],
    num_heads: int,
    offsets: Tensor | None,
    num_prefix: int,
    key_mask: Tensor | None,
) -> Tensor:
    """Return the offsets as int64 on the CPU, after a look at all arguments."""
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("keys", keys, (None, None, None))
    cases, tokens, inner = keys.shape
    width = x.shape[1]
    norm_weight, norm_bias, query_weight, query_bias, output_weight, output_bias = weights
    shaped = {
        "keys": (keys, (cases, tokens, inner)),
        "values": (values, (cases, tokens, inner)),
        "gamma": (gamma, (width,)),
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
        "query_weight": (query_weight, (inner, width)),
        "query_bias": (query_bias, (inner,)),
        "output_weight": (output_weight, (width, inner)),
        "output_bias": (output_bias, (width,)),
    }
    _check_tensors(x, shaped)
    if key_mask is not None:
        check_shape("key_mask", key_mask, (cases, tokens))
        # An integer mask would index tokens 0 and 1 instead of choosing among them.
        require(key_mask.dtype == torch.bool, f"key_mask must be bool, got {key_mask.dtype}")
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
    return bounds


def _check_tensors(x: Tensor, shaped: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Check the shape of each tensor, and that it goes with x."""
    mixed = is_autocast_on(x.device)
    for name, (tensor, shape) in shaped.items():
        check_shape(name, tensor, shape)
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), "
            f"got {tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )


def _choose(op: str, impl: str, x: Tensor, keys: Tensor, num_heads: int, tokens: int) -> str:
    """Return the implementation to run, with the reason where the kernels can't be it."""
    beyond = ops.beyond_triton(operator_dtype(x), keys.shape[2], num_heads, tokens)
    if impl == "triton" and beyond:
        raise OutOfReachError(f"{op}: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    return choose_impl(op, impl, x.device, available)


def inject(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    num_heads: int,
    offsets: Tensor | None = None,
    num_prefix: int = 0,
    key_mask: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Let every tile attend to its case's modal tokens: `x + gamma * (x + attn(LN(x)))`.

    Query and output projections come folded (`[E, D]` and `[D, E]`): a product of the adapter's
    two linear maps on either side, which is exact and a quarter of the work.

    The backward pass recomputes everything: beyond its inputs a call saves only `offsets`
    (`8 * (B + 1)` bytes), and nothing at all where no input needs a gradient. Gradients of frozen
    inputs are not computed.

    Args:
        x: `[N, D]` tokens of all cases, packed case after case without padding.
        keys: `[B, G, E]` projected keys of the modal tokens, in the dtype of `x` like every other
            tensor (under autocast any floating dtype); E is heads x head width. The Triton path
            takes at most 128 tokens, and heads that come to at most 256 columns when each is
            padded to a power of two from 16 on.
        values: `[B, G, E]` projected values.
        gamma: `[D]` gate; zero leaves the stream untouched.
        norm_weight: `[D]` LayerNorm scale on the tiles.
        norm_bias: `[D]` LayerNorm shift.
        query_weight: `[E, D]` folded query projection.
        query_bias: `[E]`.
        output_weight: `[D, E]` folded output projection.
        output_bias: `[D]`.
        num_heads: Attention heads; divides E.
        offsets: `[B + 1]` integer rows of each case; None for one case.
        num_prefix: Rows at the start of each case (cls) that pass through unchanged.
        key_mask: `[B, G]` bool, False for tokens of a missing modality. A case without any token
            passes through unchanged.
        eps: LayerNorm epsilon.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`), `cpu` or
            `reference`.

    Returns:
        `[N, D]` in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or offsets contradict each other.
        RuntimeError: The implementation asked for can't run here.

    Source: ModalTune (Ramanathan et al., 2025), injector of the Modal Adapter.
    """
    weights = (norm_weight, norm_bias, query_weight, query_bias, output_weight, output_bias)
    bounds = _check(x, keys, values, gamma, weights, num_heads, offsets, num_prefix, key_mask)
    chosen = _choose("inject", impl, x, keys, num_heads, keys.shape[1])
    if chosen != "reference":
        return ops.inject_fwd(
            x, keys, values, gamma, *weights, key_mask, bounds, num_heads, num_prefix, eps, chosen
        )
    return inject_reference(
        x,
        keys,
        values,
        gamma,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_weight=query_weight,
        query_bias=query_bias,
        output_weight=output_weight,
        output_bias=output_bias,
        num_heads=num_heads,
        offsets=bounds,
        num_prefix=num_prefix,
        key_mask=key_mask,
        eps=eps,
    )


def inject_tasks(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    task_keys: Tensor,
    task_values: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    num_heads: int,
    offsets: Tensor | None = None,
    num_prefix: int = 0,
    key_mask: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Run `inject` for T tasks that share x and all modal tokens but one: the first injector.

    Result t equals `inject` with `task_keys[:, t]` and `task_values[:, t]` as one more token. On
    the CPU without gradients, LayerNorm, queries and attention to the common tokens are computed
    once; each task adds its token as a rank-1 merge of the online softmax, exact to rounding:

        w = sigmoid(q . k_t - lse)      o_t = o + w (v_t - o)

    for the attended values o and the log-sum-exp lse of the common tokens. Where a gradient is
    needed, and under `triton` and `reference`, it is T calls of `inject`.

    Args:
        x: `[N, D]` tokens of all cases, the same for all tasks.
        keys: `[B, G, E]` projected keys of the common modal tokens; G may be 0.
        values: `[B, G, E]` their projected values.
        task_keys: `[B, T, E]` projected key of each task's own token.
        task_values: `[B, T, E]` its projected value.
        gamma: `[D]`; this and all other arguments as in `inject`.
        norm_weight: `[D]`.
        norm_bias: `[D]`.
        query_weight: `[E, D]`.
        query_bias: `[E]`.
        output_weight: `[D, E]`.
        output_bias: `[D]`.
        num_heads: Attention heads.
        offsets: `[B + 1]` integer rows of each case; None for one case.
        num_prefix: Rows at the start of each case that pass through unchanged.
        key_mask: `[B, G]` bool over the common tokens. A task's own token is never hidden.
        eps: LayerNorm epsilon.
        impl: As in `inject`.

    Returns:
        `[T, N, D]` in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or offsets contradict each other.
        RuntimeError: The implementation asked for can't run here.

    Source: METHOD 3.9: nothing before the first injector depends on the task.
    """
    weights = (norm_weight, norm_bias, query_weight, query_bias, output_weight, output_bias)
    bounds = _check(x, keys, values, gamma, weights, num_heads, offsets, num_prefix, key_mask)
    check_shape("task_keys", task_keys, (keys.shape[0], None, keys.shape[2]))
    shape = (keys.shape[0], task_keys.shape[1], keys.shape[2])
    _check_tensors(x, {"task_keys": (task_keys, shape), "task_values": (task_values, shape)})
    chosen = _choose("inject_tasks", impl, x, keys, num_heads, keys.shape[1] + 1)
    tensors = (x, keys, values, task_keys, task_values, gamma, *weights)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if chosen == "cpu" and not wanted:
        return ops.inject_tasks_fwd(*tensors, key_mask, bounds, num_heads, num_prefix, eps)
    shown = key_mask
    if key_mask is not None:
        shown = torch.cat([key_mask, key_mask.new_ones(keys.shape[0], 1)], dim=1)
    outs = [
        inject(
            x,
            torch.cat([keys, task_keys[:, task : task + 1]], dim=1),
            torch.cat([values, task_values[:, task : task + 1]], dim=1),
            gamma,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            query_weight=query_weight,
            query_bias=query_bias,
            output_weight=output_weight,
            output_bias=output_bias,
            num_heads=num_heads,
            offsets=bounds,
            num_prefix=num_prefix,
            key_mask=shown,
            eps=eps,
            impl=chosen,
        )
        for task in range(task_keys.shape[1])
    ]
    return torch.stack(outs) if outs else x.new_empty(0, *x.shape)
