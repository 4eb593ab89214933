"""The named rival against the golden files, and against our own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modaltune import ModalTune
from modaltune.batch import CaseBatch
from modaltune.benchmarks.literal_model import LiteralModel, dilated_attention
from modaltune.errors import InputError
from modaltune.golden import is_zero_gradient, relative_error
from modaltune.kernels import dilated_attention as our_dilated_attention
from modaltune.reference_config import config_from_reference
from modaltune.reference_import import model_from_reference
from modaltune.targets import distillation_loss, load_reference_projector
from modaltune.testing import normal

# Pass marks of the golden files' README.
OUT, LOSS, GRAD_ALL, GRAD_EACH, STEP, STEP_MIN_GRAD = 1e-5, 2e-5, 1e-5, 1e-4, 2e-6, 1e-5
CASES = (
    "case1_sum_avg_train",
    "case2_cat_cls",
    "case3_clinical_sum_avg",
    "case4a_long_small_wsi",
    "case4b_long_explicit_segments_train",
    "case4c_real_segments_L1500",
)


def load(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta = json.loads((folder / "golden" / f"{name}.json").read_text())
    return {"name": name, **meta}, load_file(folder / "golden" / f"{name}.safetensors")


def build(meta: dict[str, Any], stored: dict[str, Tensor]) -> tuple[LiteralModel, CaseBatch]:
    sizes = meta["pathway_sizes"]
    genes = torch.cat([stored[f"in/genes.{i}"] for i in range(len(sizes))], dim=1)
    model = ModalTune(
        config_from_reference(meta),
        gene_index=torch.arange(sum(sizes)),
        gene_offsets=torch.tensor([0, *sizes]).cumsum(0),
    )
    weights = {k.removeprefix("weights/"): t for k, t in stored.items() if k.startswith("weights/")}
    model_from_reference(model, weights)
    modalities = {"genes": genes}
    if meta["clinical"]:
        modalities["clinical"] = stored["in/clinical"]
    tiles = stored["in/x"][0]
    bounds = torch.tensor([0, tiles.shape[0]])
    return LiteralModel(model), CaseBatch(tiles, stored["in/coords"][0], bounds, modalities)


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_passes_the_golden_files(shared_dir: Path, name: str) -> None:
    meta, stored = load(shared_dir, name)
    literal, batch = build(meta, stored)
    projector = load_reference_projector(
        {k.removeprefix("projector/"): t for k, t in stored.items() if k.startswith("projector/")},
        prefix="",
    )
    targets = projector.project(stored["in/text"])[meta["label_rows"]][None]
    if not meta["train"]:
        with torch.no_grad():
            outputs = literal(batch)
        assert relative_error(outputs[0], stored["out/logits"]) < OUT
        loss = distillation_loss(outputs, targets).mean()
        assert abs(float(loss - stored["out/loss"])) < LOSS
        return
    optimizer = torch.optim.AdamW(
        literal.parameters(),
        lr=meta["lr"],
        betas=tuple(meta["betas"]),
        eps=meta["adam_eps"],
        weight_decay=meta["weight_decay"],
    )
    outputs, loss = literal.train_step(batch, targets, optimizer)
    assert relative_error(outputs[0], stored["out/logits"]) < OUT
    assert abs(float(loss - stored["out/loss"])) < LOSS
    names = [n for n in stored if n.startswith("grad/") and not is_zero_gradient(n[5:], meta)]
    assert {n[5:] for n in names} <= set(literal.trainable)
    got = {}
    for n in names:
        grad = literal.weights[n[5:]].grad
        assert grad is not None, n
        got[n] = grad
        assert relative_error(grad, stored[n]) < GRAD_EACH, n
        clear = stored[n].abs() > STEP_MIN_GRAD
        step = (literal.weights[n[5:]].detach() - stored[f"step/{n[5:]}"]).abs()
        assert float(step[clear].max() if bool(clear.any()) else 0) < STEP, n
    flat = [torch.cat([tensors[n].flatten() for n in names]) for tensors in (got, stored)]
    assert relative_error(*flat) < GRAD_ALL
    with torch.no_grad():
        assert relative_error(literal(batch)[0], stored["out/logits_after_step"]) < OUT


@pytest.mark.parametrize(
    ("length", "heads", "segments", "ratios"),
    [(50, 8, (1024, 5792), (1, 2)), (101, 6, (16, 32, 64), (1, 2, 4)), (1, 4, (8,), (1,))],
)
def test_dilated_attention_equals_ours(
    length: int, heads: int, segments: tuple[int, ...], ratios: tuple[int, ...]
) -> None:
    q, k, v = (normal(i, length, heads, 8).requires_grad_() for i in range(3))
    got = dilated_attention(q, k, v, segments, ratios)
    want = our_dilated_attention(
        q, k, v, segment_lengths=segments, dilation_ratios=ratios, impl="reference"
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    pulled = normal(5, *got.shape)
    for one, other in zip(
        torch.autograd.grad(got, (q, k, v), pulled),
        torch.autograd.grad(want, (q, k, v), pulled),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_other_encoders_are_refused() -> None:
    from modaltune.config import ModalTuneConfig
    from modaltune.slide_encoders.titan import TitanConfig

    config = ModalTuneConfig(
        slide_encoder=TitanConfig(width=48, depth=12, heads=3, pooler_heads=3), genes=None
    )
    with pytest.raises(InputError, match="must have a LongNet and genes"):
        LiteralModel(ModalTune(config))
