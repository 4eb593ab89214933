"""Pathway networks: hundreds of small ragged networks over one expression vector at once."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_shape, is_autocast_on, require
from modaltune.kernels._dispatch import OutOfReachError, choose_impl
from modaltune.kernels.grouped_mlp import ops
from modaltune.kernels.grouped_mlp.reference import pathway_mlp_reference

MAX_SEED = 2**31 - 1


def _check_arguments(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    mixed: bool,
) -> None:
    check_float("expression", expression)
    check_shape("expression", expression, (None, None))
    require(
        gene_index.dim() == 1 and gene_index.dtype in (torch.int32, torch.int64),
        f"gene_index must be a 1-D integer tensor, got {gene_index.dtype} {[*gene_index.shape]}",
    )
    check_shape("weight1", weight1, (gene_index.numel(), None))
    width = weight1.shape[1]
    # Other offsets than a vector are refused where they are looked at.
    pathways = offsets.numel() - 1 if offsets.dim() == 1 else bias1.shape[0]
    named = {
        "gene_index": (gene_index, (gene_index.numel(),)),
        "weight1": (weight1, (gene_index.numel(), width)),
        "bias1": (bias1, (pathways, width)),
        "weight2": (weight2, (pathways, width, width)),
        "bias2": (bias2, (pathways, width)),
    }
    for name, (tensor, shape) in named.items():
        check_shape(name, tensor, shape)
        same = name == "gene_index" or mixed or tensor.dtype == expression.dtype
        require(
            tensor.device == expression.device and same,
            f"{name} must have the dtype and device of expression ({expression.dtype}, "
            f"{expression.device}), got {tensor.dtype}, {tensor.device}; cast it, or run under "
            "torch.autocast",
        )


def pathway_mlp(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    offsets: Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Run one two-layer self-normalising network per pathway on the genes it lists.

        y_bp = drop(ELU(W2_p drop(ELU(W1_p^T x_b[genes of p] + b1_p)) + b2_p))

    Beyond its inputs a call saves nothing for backward (0 bytes): the backward pass computes both
    layers again, and draws the bits of dropout again from the seed and each unit's position.
    Gradients of frozen inputs are not computed. Every path and the reference drop the same units.

    Args:
        expression: `[B, M]` standardised expression of M genes for B cases.
        gene_index: `[nnz]` integer, the genes of all pathways, pathway after pathway; a gene may
            be listed by several.
        weight1: `[nnz, d]` first layer, one row per membership, in the dtype of `expression` (under
            autocast any floating dtype).
        bias1: `[P, d]`.
        weight2: `[P, d, d]` second layer, `[out, in]` per pathway.
        bias2: `[P, d]`.
        offsets: `[P + 1]` integer, best on the CPU: first membership of each pathway and nnz; no
            pathway is empty.
        dropout_p: Alpha dropout after each ELU, 0 to 1; 0 in evaluation.
        seed: 0 to 2^31 - 1, needed where `dropout_p` is above 0: another one for every call.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`; d at most 256),
            `cpu` or `reference`.

    Returns:
        `[B, P, d]` one token per pathway, in the dtype of `expression`. Under autocast `triton`
        runs in the dtype of autocast, `cpu` in the widest dtype of its inputs.

    Raises:
        TypeError: `expression` is not floating point.
        ValueError: Shapes, dtypes or devices contradict each other, a pathway is empty, an index is
            out of range, or dropout has no seed.
        RuntimeError: `impl` was asked for by name and can't run here.

    Source: pathway encoder of SurvPath and ModalTune; Klambauer et al., "Self-Normalizing Neural
        Networks" (NeurIPS 2017), section 3.
    """
    mixed = is_autocast_on(expression.device)
    tensors = (expression, gene_index, weight1, bias1, weight2, bias2)
    _check_arguments(*tensors, offsets, mixed)
    require(0.0 <= dropout_p < 1.0, f"dropout_p must lie in [0, 1), got {dropout_p}")
    require(
        dropout_p == 0 or seed is not None,
        "seed must be given where dropout_p is above 0, got None; draw one for each call",
    )
    drawn = 0 if seed is None else seed
    require(0 <= drawn <= MAX_SEED, f"seed must lie in 0..{MAX_SEED}, got {seed}")
    # Under autocast the operator casts (see ops).
    dtype = torch.get_autocast_dtype(expression.device.type) if mixed else expression.dtype
    beyond = ops.why_not_triton(dtype, bias1.shape[1])
    if impl == "triton" and beyond:
        raise OutOfReachError(f"pathway_mlp: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    chosen = choose_impl("pathway_mlp", impl, expression.device, available)
    if chosen == "reference":
        bounds = ops.check_members(gene_index, offsets, expression.shape[1])
        return pathway_mlp_reference(*tensors, offsets=bounds, dropout_p=dropout_p, seed=drawn)
    return ops.pathway_mlp_fwd(*tensors, offsets, float(dropout_p), drawn, chosen)
