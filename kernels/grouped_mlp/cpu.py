"""The ragged pathway networks on the CPU: compiled loops, pathways shared out among threads.

As many pathways as the cache holds hidden units of go through a layer together, so its weights come
from memory once and no `[P, B, d]` array exists between the layers. Half precision is computed in
float32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels.grouped_mlp._dropout import AlphaDropout

_SHARES_PER_THREAD = 4  # a thread that the machine holds up leaves its share to the others
# Multiplications that are worth a thread. Unless told to sleep, torch's own threads spin for
# milliseconds after each of its operations: one that starts beside them costs a single case more
# than it brings.
_WORK_PER_THREAD = 2**23 if os.environ.get("GOMP_SPINCOUNT") == "0" else 2**25


def _in_threads(run: Callable[[int, int], None], offsets: Tensor, width: int, cases: int) -> None:
    """Call `run(first, last)` over all pathways, shares of like size side by side on threads.

    Plain threads around loops that hold no GIL, not numba's parallel=True: numba's thread pools end
    the process when they meet a fork or a second calling thread.
    """
    pathways = offsets.numel() - 1
    rows = offsets + torch.arange(pathways + 1) * width  # rows of both layers before a pathway
    worth = cases * width * int(rows[-1]) // _WORK_PER_THREAD
    threads = min(torch.get_num_threads(), pathways, worth)
    if threads <= 1:
        run(0, pathways)
        return
    shares = min(threads * _SHARES_PER_THREAD, pathways)
    cuts = torch.searchsorted(rows, torch.arange(1, shares) * int(rows[-1]) // shares).tolist()
    edges = [0, *cuts, pathways]
    numbers = count()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while (share := next(numbers)) < shares:
                run(edges[share], edges[share + 1])
        except BaseException as error:  # raised again in the calling thread
            errors.append(error)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    """Return arrays in the dtype of the computation: float64 for float64, else float32."""
    exact = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [
        t.detach().to(exact if t.is_floating_point() else torch.int64).contiguous().numpy()
        for t in tensors
    ]


def _dropout(exact: Any, dropout_p: float) -> tuple[int, tuple[Any, ...]]:
    drop = AlphaDropout.of(dropout_p)
    return drop.threshold, tuple(exact.type(v) for v in (drop.scale, drop.shift, drop.dropped))


def pathway_mlp_cpu_fwd(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    dropout_p: float,
    seed: int,
) -> Tensor:
    """Return `[B, P, d]`, equal to the reference to rounding."""
    from modaltune.kernels.grouped_mlp import _loops

    x, genes, bounds, *weights = _arrays(
        [expression, gene_index, offsets, weight1, bias1, weight2, bias2]
    )
    out = torch.from_numpy(x).new_empty(x.shape[0], *bias1.shape)
    threshold, affine = _dropout(x.dtype, dropout_p)
    given, target = (x, genes, bounds, *weights), out.numpy()

    def run(first: int, last: int) -> None:
        _loops.forward(*given, target, first, last, seed, threshold, affine)

    if out.numel():
        _in_threads(run, offsets, bias1.shape[1], len(x))
    return out.to(expression.dtype)


def pathway_mlp_cpu_bwd(
    grad_out: Tensor,
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    dropout_p: float,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of those of expression and the four weights that `needs` names."""
    from modaltune.kernels.grouped_mlp import _loops

    x, genes, bounds, *weights = _arrays(
        [expression, gene_index, offsets, weight1, bias1, weight2, bias2]
    )
    pulled = _arrays([grad_out])[0]
    exact = torch.from_numpy(x)
    shapes = [(x.shape[0], genes.size), *(w.shape for w in weights)]
    grads = [
        exact.new_zeros(shape if need else (0,) * len(shape))
        for shape, need in zip(shapes, needs, strict=True)
    ]
    threshold, affine = _dropout(x.dtype, dropout_p)
    given = (pulled, x, genes, bounds, *weights, *(g.numpy() for g in grads))

    def run(first: int, last: int) -> None:
        _loops.backward(*given, first, last, seed, threshold, affine)

    if any(needs):
        _in_threads(run, offsets, bias1.shape[1], len(x))
    if needs[0]:
        by_gene = exact.new_zeros(exact.shape)
        grads[0] = by_gene.index_add_(1, gene_index.long(), grads[0])
    return [g.to(expression.dtype) for g, need in zip(grads, needs, strict=True) if need]
