"""Golden files of the published model through the Triton kernels, interpreted on the CPU.

All of a folder: `TRITON_INTERPRET=1 modaltune golden DIR --impl triton`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modaltune.errors import InputError
from modaltune.golden import device_for, run_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Every kind of module, the published misalignment, and a whole model with gradients and a step.
CASES = (
    "case1_sum_avg_train",
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


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"must have a GPU, or TRITON_INTERPRET=1 .* got neither"):
        device_for("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for("triton") == "cuda"
    assert device_for("auto") == "cpu"
