"""The whole-model benchmark: two sides with the same answers, limits, rows, the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from modaltune.benchmarks import model_speed
from modaltune.benchmarks.model_sides import SIDES, Workload, build_model
from modaltune.benchmarks.model_speed import (
    Measured,
    check_answers,
    measure,
    relative_errors,
    row_of,
)
from modaltune.benchmarks.model_worker import Worker
from modaltune.cli import app
from modaltune.engine.errors import InputError
from modaltune.kernels import pin_products, product_choice
from modaltune.machine_limits import Rates, measure_rates

FACTS = {
    "products": 8e9,
    "attention": 1e9,
    "library": "torch",
    "packed_bytes": 2**20,
    "torch": "2",
    "threads": 2,
    "name": None,
}


def measured(work: Workload | None = None, **changes: Any) -> Measured:
    given = {
        "work": work or Workload(10),
        "ours_s": [0.2, 0.1, 0.3],
        "rival_s": [0.5, 0.4, 0.1],
        "ours_cpu_s": [0.1],
        "rival_cpu_s": [0.2],
        "ours_peak": 2**20,
        "rival_peak": 4 * 2**20,
        "parts": {"longnet.ffn": 0.1},
        "rates": Rates(1e11, 2e10, 1e10),
        "facts": FACTS,
        "errors": {"outputs": 1e-7},
    }
    return Measured(**{**given, **changes})


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_both_sides_give_the_same_answers(mode: Any, tasks: int, trunk: Any) -> None:
    work = Workload(70, mode, tasks, "small", trunk)
    found = []
    for kind in SIDES.values():
        side = kind(work)
        answers = {"out": side.run()}
        assert answers["out"].shape == (1, tasks, 8)
        if mode == "train":
            answers |= {f"grad/{name}": grad for name, grad in side.gradients().items()}
            assert len(answers) > 100
            before = answers["out"]
            assert not torch.equal(side.run(), before)  # the weights have moved
        found.append(answers)
    errors = check_answers(relative_errors(*found, is_training=mode == "train"))
    assert set(errors) == ({"outputs"} if mode == "forward" else {"outputs", "gradients"})


def test_wrong_answers_are_refused() -> None:
    good = {"out": torch.ones(1, 3, 4), "grad/w": torch.ones(5)}
    errors = relative_errors(good, good, is_training=True)
    assert check_answers(errors) == {"outputs": 0.0, "gradients": 0.0}
    with pytest.raises(RuntimeError, match="a wrong result is not timed"):
        check_answers({"outputs": 0.02}, {"outputs": 0.01})
    for name in good:
        wrong = {**good, name: good[name] * (1 + 1e-3)}
        with pytest.raises(RuntimeError, match="a wrong result is not timed"):
            check_answers(relative_errors(wrong, good, is_training=True))
    nan = {**good, "out": good["out"] * torch.nan}
    with pytest.raises(RuntimeError, match="a wrong result is not timed"):
        check_answers(relative_errors(nan, good, is_training=False))
    with pytest.raises(RuntimeError, match=r"only one side has \['grad/w'\]"):
        relative_errors({"out": good["out"]}, good, is_training=True)


def test_the_injectors_let_something_in() -> None:
    model = build_model(Workload(5, size="small"))
    gates = [block.injector.gamma for block in model.adapter.interactions()]
    assert all(float(gamma.detach().abs().min()) > 0 for gamma in gates)
    assert not model.training


def test_medians_limits_and_bars() -> None:
    found = measured().to_dict()
    assert (found["ours_s"], found["rival_s"], found["ratio"]) == (0.2, 0.4, 2.0)
    assert (found["cpu_ratio"], found["slides_per_h"]) == (2.0, 18000.0)
    assert found["limit_s"] == pytest.approx(8e9 / 1e11 + 1e9 / 2e10)  # 0.13 s
    assert found["share_of_limit"] == pytest.approx(0.65)
    assert found["best_round_share_of_limit"] == pytest.approx(1.3)
    assert found["bars"] == {"ratio": "pass", "share_of_limit": "missed"}
    assert (found["useful_gflop"], found["gflops"]) == (9.0, 45.0)
    assert (found["ours_peak_mib"], found["memory_share"]) == (1.0, 0.25)
    train = measured(Workload(10, "train"), ours_peak=3 * 2**20).to_dict()
    assert train["limit_s"] == pytest.approx(8e9 / 1e11 + 1e9 / 1e10)
    assert train["bars"] == {"ratio": "pass", "memory_share": "missed"}
    assert measured(Workload(10, tasks=1)).to_dict()["bars"] == {}
    unknown = measured(Workload(10, "train"), ours_peak=None).to_dict()
    assert unknown["memory_share"] is None
    assert unknown["bars"] == {"ratio": "pass"}


def test_rates_are_joined_and_the_pin_is_left_alone() -> None:
    joined = Rates(3.0, 1.0, 5.0).better(Rates(2.0, 4.0, 1.0))
    assert joined == Rates(3.0, 4.0, 5.0)
    pin_products("torch")
    try:
        rates = measure_rates(rounds=1)
        assert product_choice().describe() == "torch (pinned)"
    finally:
        pin_products(None)
    assert min(rates.products, rates.attention, rates.attention_training) > 1e8
    assert product_choice().why != "pinned"


def test_nonsense_and_too_little_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--tasks 1 to 3, got 5, 1 and 4"):
        measure(Workload(5, tasks=4), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="must be cpu on a machine without a GPU, got cuda"):
        measure(Workload(5, where="cuda"), 1)
    monkeypatch.setattr(model_speed, "free_bytes", lambda device: 2.0**30)
    with pytest.raises(InputError, match=r"about 1[0-9] GiB for a training step, got 1 GiB"):
        measure(Workload(4000, "train"), 1)


def test_a_side_that_dies_is_an_error() -> None:
    worker = Worker("ours", Workload(3, size="small"))
    try:
        with pytest.raises(RuntimeError, match="the ours side ended with exit code 1"):
            worker.ask("nothing of the kind")
    finally:
        worker.close()


@pytest.mark.slow
def test_the_command_prints_json_and_saves_a_row(tmp_path: Path) -> None:
    arguments = ["bench", "model", "--tiles", "40", "--mode", "train", "--size", "small"]
    arguments += ["--rounds", "1", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    asked = {"ours_s", "rival_s", "ratio", "slides_per_h", "ours_peak_mib", "rival_peak_mib"}
    assert asked | {"parts_s", "useful_gflop", "gflops", "share_of_limit"} <= set(found)
    assert found["errors"]["gradients"] < 1e-5
    assert (found["pathways"], found["memberships"]) == (331, 9745)
    assert any(part.startswith("longnet.ffn") for part in found["parts_s"])
    with (tmp_path / "model_speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["train"]
    assert json.loads(rows[0]["parts_s"]) == found["parts_s"]
    assert rows[0].keys() == {k: str(v) for k, v in row_of(found).items()}.keys()


def test_the_table_says_it_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_speed, "measure", lambda work, rounds: measured(work))
    done = CliRunner().invoke(app, ["bench", "model", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for text in ("2.00 x", "longnet.ffn", "18,000.0 slides/h", "65% reached", "ratio: pass"):
        assert text in done.output

    def wrong(work: Workload, rounds: int) -> Measured:
        raise RuntimeError("the answers must agree")

    monkeypatch.setattr(model_speed, "measure", wrong)
    done = CliRunner().invoke(app, ["bench", "model", "--results", str(tmp_path)])
    assert done.exit_code == 1
    assert len((tmp_path / "model_speed.csv").read_text().splitlines()) == 2
