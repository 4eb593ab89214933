"""Golden files of the published model through the Triton kernels, interpreted on the CPU.

All of a folder: `TRITON_INTERPRET=1 modaltune golden DIR --impl triton`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modaltune.adapter import AdapterConfig
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.golden import device_for, run_case
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.published_size import random_cases
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.testing import INTERPRET

# Every kind of module, and the published misalignment. Whole models of the files take minutes each
# in the interpreter: the command above runs them, and a smaller one is run below.
CASES = (
    "case5_dilated_a",
    "case5_dilated_b_headpad",
    "case5_dilated_e_quirk_misaligned",
    "case5_extractor",
    "case5_gene_encoder",
    "case5_injector",
    "case5_longnet_layer",
    "case5_nocffn_extractor",
    "case5_nocffn_injector",
    "case5_pos_embed",
)


@pytest.mark.triton
@pytest.mark.shared
@pytest.mark.parametrize("case", CASES)
def test_golden_through_the_kernels(shared_dir: Path, case: str) -> None:
    rows = run_case(shared_dir / "golden" / f"{case}.json", "triton")
    assert [row for row in rows if not row.is_ok] == []
    notes = {row.note for row in rows if "reference" in row.note}
    if case == "case5_dilated_e_quirk_misaligned":
        (note,) = notes
        assert "is no multiple of its dilation" in note
    else:
        assert notes == set()


def gradients(model: ModalTune, impl: str) -> dict[str, Tensor]:
    """Outputs and every gradient of one case with 11 tiles and two tasks."""
    model.set_impl(impl)
    model.zero_grad()
    batch = random_cases(model, tiles=11, seed=5)
    dtype = model.modal_positions.dtype
    out = model(batch.to(torch.get_default_device(), dtype))
    out.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


@pytest.mark.triton
def test_a_whole_model_through_the_kernels() -> None:
    trunk = LongNetConfig(
        in_features=8,
        width=32,
        depth=2,
        heads=2,
        ffn_width=32,
        segment_lengths=(8, 16),
        dilation_ratios=(1, 2),
        grid_cells=100,
    )
    config = ModalTuneConfig(
        slide_encoder=trunk,
        adapter=AdapterConfig(heads=2, bottleneck=0.5, interactions=((0, 0), (1, 1))),
        genes=GeneConfig(width=16, depth=1, tokens=3),
        tasks=("one", "two"),
        out_features=8,
    )
    torch.manual_seed(0)
    sizes = torch.tensor([0, 3, 4, 9])
    model = ModalTune(config, gene_index=torch.arange(9), gene_offsets=sizes).eval()
    for parameter in model.parameters():  # nothing at its start: gates are zero there
        torch.nn.init.normal_(parameter, std=0.3)
    ours, plain = (gradients(model, impl) for impl in ("triton", "reference"))
    exact = gradients(model.double(), "reference")
    assert len(exact) > 60
    assert set(ours) == set(exact)
    for name, want in exact.items():
        lost, error = (float((t[name].double() - want).norm()) for t in (plain, ours))
        # Twice what the plain form loses; gradients that are zero on paper hold only rounding.
        assert error <= 2 * lost + 1e-5 * float(want.norm()) + 1e-6, (name, error, lost)


@pytest.mark.skipif(INTERPRET, reason="the interpreter is on")
def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"must have a GPU, or TRITON_INTERPRET=1 .* got neither"):
        device_for("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for("triton") == "cuda"
    assert device_for("auto") == "cpu"
