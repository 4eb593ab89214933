"""The literal rivals of `inject` and `extract`: the golden files, ours, the gate, a whole run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modaltune.benchmarks.extraction import literal_extract, our_extract
from modaltune.benchmarks.extraction import main as main_extract
from modaltune.benchmarks.injection import (
    CSV_NAME,
    TOKENS,
    WIDTH,
    draw_weights,
    gate,
    literal_inject,
    our_inject,
)
from modaltune.benchmarks.injection import main as main_inject
from modaltune.engine.errors import InputError
from modaltune.testing import normal


def _golden_weights(stored: dict[str, Tensor], meta: dict[str, object]) -> dict[str, Tensor]:
    """The published module's weights under the benchmark's names."""
    w = {n.removeprefix("weights/"): t for n, t in stored.items()}
    mha = {n.split("multihead_attn.")[1]: t for n, t in w.items() if n.startswith("attn.multi")}
    bq, bk, bv = mha["in_proj_bias"].chunk(3)
    if meta["with_cffn"]:
        wq, wk, wv = (mha[f"{n}_proj_weight"] for n in "qkv")
    else:
        wq, wk, wv = mha["in_proj_weight"].chunk(3)
    found = {"query_weight": wq, "query_bias": bq, "key_weight": wk, "key_bias": bk}
    found |= {"value_weight": wv, "value_bias": bv, "positions": stored["in/pos"].squeeze(0)}
    for name in ("weight", "bias"):
        found[f"out_{name}"] = mha[f"out_proj.{name}"]
        found[f"norm_{name}"] = w[f"attn.norm.{name}"]
        found[f"norm_kv_{name}"] = w[f"attn.norm_kq.{name}"]
        if meta["with_cffn"]:
            found[f"reduce_{name}"] = w[f"attn.q_proj.{name}"]
            found[f"expand_{name}"] = w[f"attn.output_proj.{name}"]
    return found


def _load(shared_dir: Path, case: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    stem = shared_dir / "golden" / case
    meta = json.loads(stem.with_suffix(".json").read_text())
    return {n: t.double() for n, t in load_file(stem.with_suffix(".safetensors")).items()}, meta


@pytest.mark.shared
@pytest.mark.parametrize("form", [literal_inject, our_inject])
@pytest.mark.parametrize("case", ["case5_injector", "case5_nocffn_injector"])
def test_injector_is_the_published_one(shared_dir: Path, case: str, form: object) -> None:
    stored, meta = _load(shared_dir, case)
    weights = _golden_weights(stored, meta) | {"gamma": stored["weights/gamma"]}
    y = form(stored["in/query"][0], stored["in/feat"][0], weights, meta["num_heads"])
    error = torch.linalg.norm(y - stored["out/y"][0]) / torch.linalg.norm(y)
    assert error <= 1.5 * meta["ref_fp32_vs_fp64"]["y"]["rel_fro"]


@pytest.mark.shared
@pytest.mark.parametrize("form", [literal_extract, our_extract])
@pytest.mark.parametrize("case", ["case5_extractor", "case5_nocffn_extractor"])
def test_extractor_is_the_published_one(shared_dir: Path, case: str, form: object) -> None:
    stored, meta = _load(shared_dir, case)
    w = {n.removeprefix("weights/"): t for n, t in stored.items()}
    weights = _golden_weights(stored, meta)
    y = form(stored["in/feat"][0], stored["in/query"][0], weights, meta["num_heads"])
    if meta["with_cffn"]:
        hidden = F.layer_norm(y, y.shape[1:], w["ffn.norm.weight"], w["ffn.norm.bias"])
        hidden = F.relu(F.linear(hidden, w["ffn.linear1.weight"], w["ffn.linear1.bias"]))
        y = y + F.linear(hidden, w["ffn.linear2.weight"], w["ffn.linear2.bias"])
    error = torch.linalg.norm(y - stored["out/y"][0]) / torch.linalg.norm(y)
    assert error <= 1.5 * meta["ref_fp32_vs_fp64"]["y"]["rel_fro"]


def test_the_gate_refuses_a_wrong_answer() -> None:
    x, modal = (normal(n, n, WIDTH, dtype=torch.float32) for n in (50, TOKENS))
    weights = draw_weights()
    gate(our_inject, literal_inject, x, modal, weights)

    def wrong(*arguments: Tensor) -> Tensor:
        return our_inject(*arguments) + 1e-3

    with pytest.raises(InputError, match="a benchmark must time right answers, got an error of 0"):
        gate(wrong, literal_inject, x, modal, weights)


@pytest.mark.parametrize(("main", "op"), [(main_inject, "injection"), (main_extract, "extraction")])
def test_appends_a_row(
    main: object, op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        given = ["--tiles", "300", "--runs", "2", "--json", "--results", str(tmp_path)]
        assert main(given) == 0
    finally:
        torch.set_num_threads(threads)
    printed = json.loads(capsys.readouterr().out)
    (row,) = csv.DictReader((tmp_path / CSV_NAME).open())
    assert row == {name: str(value) for name, value in printed.items()}
    assert (row["op"], row["tiles"], row["rival"]) == (op, "300", "literal")
    assert float(row["ratio"]) > 0
