"""The benchmark of dilated attention: its rival is the published form, its gate can fail."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modaltune.benchmarks import dilated_attn
from modaltune.benchmarks.dilated_attn import (
    check,
    dilated_attention_literal,
    is_met,
    main,
    make_inputs,
    ours,
)
from modaltune.kernels import dilated_attention
from modaltune.testing import normal, run_with_gradients


@pytest.mark.parametrize("length", [3, 100, 333])
def test_the_rival_is_the_published_form(length: int) -> None:
    """In float64, output and gradients, with padding in every branch; also misaligned segments."""
    inputs = {n: normal(i, length, 16, 4) for i, n in enumerate("qkv")}
    how = {"segment_lengths": (64, 128, 130, 256, 256), "dilation_ratios": (1, 2, 4, 8, 16)}
    got = run_with_gradients(dilated_attention_literal, inputs, **how)
    want = run_with_gradients(dilated_attention, inputs, impl="reference", **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-12, msg=name)


def test_a_wrong_result_is_not_timed() -> None:
    def almost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q, k, v) * (1 + 2e-6)

    check(make_inputs(200))
    with pytest.raises(RuntimeError, match=r"out is off by .*: not timed"):
        check(make_inputs(200), almost)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_row_is_appended_and_printed(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["--tiles", "150", "--mode", mode, "--rounds", "2", "--json", "--results", str(tmp_path)]
    )
    told = json.loads(capsys.readouterr().out)
    with (tmp_path / dilated_attn.CSV_NAME).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["mode"] == mode
    assert row["tiles"] == "150"
    for side in ("ours", "rival"):
        assert 0 < float(row[f"{side}_p20_s"]) <= float(row[f"{side}_p80_s"])
    assert told["met"] is (code == 0)


def test_bars() -> None:
    row = {"tiles": 4000, "qkvo_mib": 100.0, "ours_extra_mib": 175.0, "ratio_of_minima": 1.5}
    assert is_met(row)  # 25 of the 175 are the output
    assert not is_met({**row, "ours_extra_mib": 176.0})
    assert is_met({**row, "ours_extra_mib": 176.0, "tiles": 3999})
    assert not is_met({**row, "ratio_of_minima": 1.49})


@pytest.mark.parametrize("wrong", [["--tiles", "0"], ["--rounds", "0"], ["--results", "/nowhere"]])
def test_bad_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
