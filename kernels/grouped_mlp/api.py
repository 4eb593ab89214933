"""Pathway networks: hundreds of small ragged networks over one expression vector at once."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.grouped_mlp.cpu import pathway_mlp_cpu
from modaltune.kernels.grouped_mlp.reference import pathway_mlp_reference


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
    impl: str = "auto",
) -> Tensor:
    """Run one two-layer self-normalising network per pathway on the genes it lists.

    Args:
        expression: `[B, M]` standardised expression of M genes for B cases.
        gene_index: `[nnz]` integer, the genes of all pathways, pathway after pathway; a gene may
            be listed by several.
        weight1: `[nnz, d]` first layer, one row per membership.
        bias1: `[P, d]`.
        weight2: `[P, d, d]` second layer, `[out, in]` per pathway.
        bias2: `[P, d]`.
        offsets: `[P + 1]` integer, first membership of each pathway and nnz; no pathway is empty.
        dropout_p: Alpha dropout after each ELU, 0 to 1; 0 in evaluation.
        impl: `auto`, `triton`, `cpu` or `reference`.

    Returns:
        `[B, P, d]` one token per pathway.

    Raises:
        ValueError: Shapes contradict each other, a pathway is empty, or an index is out of range.

    Source: pathway encoder of SurvPath and ModalTune; Klambauer et al., 2017.
    """
    check_float("expression", expression)
    check_shape("expression", expression, (None, None))
    require(
        gene_index.dim() == 1 and gene_index.dtype in (torch.int32, torch.int64),
        f"gene_index must be a 1-D integer tensor, got {gene_index.dtype} {[*gene_index.shape]}",
    )
    check_shape("weight1", weight1, (gene_index.numel(), None))
    width = weight1.shape[1]
    bounds = check_offsets(offsets, gene_index.numel())
    pathways = bounds.numel() - 1
    check_shape("bias1", bias1, (pathways, width))
    check_shape("weight2", weight2, (pathways, width, width))
    check_shape("bias2", bias2, (pathways, width))
    require(
        pathways > 0 and bool((bounds.diff() > 0).all()),
        "offsets must hold at least one pathway, and every pathway at least one gene, got "
        f"{bounds.tolist()[:8]}",
    )
    require(
        int(gene_index.min()) >= 0 and int(gene_index.max()) < expression.shape[1],
        f"gene_index must lie in 0..{expression.shape[1] - 1}, got {int(gene_index.min())}.."
        f"{int(gene_index.max())}",
    )
    require(0.0 <= dropout_p < 1.0, f"dropout_p must lie in [0, 1), got {dropout_p}")
    chosen = choose_impl("pathway_mlp", impl, expression.device, ("cpu", "reference"))
    run = pathway_mlp_cpu if chosen == "cpu" else pathway_mlp_reference
    return run(
        expression,
        gene_index,
        weight1,
        bias1,
        weight2,
        bias2,
        offsets=bounds,
        dropout_p=dropout_p,
    )
