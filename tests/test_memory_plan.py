"""The planner: counts are exact, formulas meet live memory, the choice follows the budget."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from modaltune import plan_report
from modaltune.adapter import AdapterConfig
from modaltune.benchmarks.memory_plan import BAR, compare, main
from modaltune.cli import app
from modaltune.config import ModalTuneConfig
from modaltune.engine.device import check_device
from modaltune.errors import InputError
from modaltune.kernels.frozen_product.api import (
    ProductChoice,
    pin_products,
    product_choice,
    product_libraries,
)
from modaltune.memory_plan import (
    MODES,
    RECOMPUTE,
    MemoryPlan,
    Planned,
    Setting,
    cheapest,
    settings,
)
from modaltune.memory_probe import Line, count_memory, count_parts
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.published_size import published_size_model, random_cases
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig
from modaltune.testing_training import accumulate_gradients
from modaltune.train import TrainConfig

CPU = torch.device("cpu")
GENES = GeneConfig(width=8, depth=1, tokens=4)
LONGNET = LongNetConfig(in_features=24, width=48, depth=5, heads=4, ffn_width=96)
TITAN = TitanConfig(in_features=24, width=48, depth=5, heads=4, pooler_heads=2, pooler_queries=2)
TILES = 1200


def small(encoder: Any = LONGNET, **changes: Any) -> ModalTune:
    adapter = AdapterConfig(heads=4, interactions=((0, 1), (2, 4)))
    config = ModalTuneConfig(
        slide_encoder=encoder, adapter=adapter, genes=GENES, out_features=8, **changes
    )
    torch.manual_seed(0)
    return published_size_model(config)


def no_process() -> dict[Any, float]:
    return dict.fromkeys(MODES, 0.0)


def test_counts_are_exact() -> None:
    def run() -> Tensor:
        first = torch.ones(1000, dtype=torch.float64)  # 8,000 bytes
        second = first + 1
        del first
        third = torch.ones(500, dtype=torch.float64)
        return second[:10] + third[:10].sum()  # 80 bytes are left

    run()
    kept, counted = count_memory(run, CPU)
    assert kept.numel() == 10
    assert counted.left == pytest.approx(80, abs=128)  # the allocator rounds up
    assert counted.peak == pytest.approx(16000, abs=256)


def test_a_line_goes_through_its_points() -> None:
    line = Line.through((10, 30), (5.0, 45.0))
    assert (line.slope, line.constant, line.at(10), line.at(30)) == (2.0, -15.0, 5.0, 45.0)


def test_parts_follow_the_layers() -> None:
    model = small()
    before = count_parts(model, 400)
    rows = before.tokens.slope
    assert rows == 48 * 4

    class Wasteful(nn.Module):
        """Keeps two more activations of the width: what sine and cosine were taken of."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Any) -> Any:
            tokens = self.inner(tokens)
            return tokens.with_x(tokens.x.sin().cos())

    encoder: Any = model.slide_encoder
    encoder.layers[4] = Wasteful(encoder.layers[4])
    after = count_parts(model, 400)
    added = (after.layer.held.slope - before.layer.held.slope) / rows
    assert added == pytest.approx(2.0, abs=0.05)
    assert after.injector.held.slope == pytest.approx(before.injector.held.slope, rel=0.01)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("encoder", [LONGNET, TITAN], ids=["longnet", "titan"])
def test_formulas_meet_what_is_alive(encoder: Any) -> None:
    """The whole model's live memory, counted, against the sum of its parts."""
    model = small(encoder)
    plan = MemoryPlan(model, TILES, no_process())
    batch = random_cases(model, TILES)
    targets = F.normalize(torch.randn(1, 3, 8), dim=-1)
    some = [Setting("forward"), Setting("train", "shared"), Setting("train", "separate", "joint")]
    some += [Setting("train", "shared", "sequential", level) for level in RECOMPUTE[1:]]
    for setting in some:
        model.adjust(task_trunk=setting.task_trunk, recompute=setting.recompute)
        model.zero_grad(set_to_none=True)
        gc.collect()

        def run(setting: Setting = setting) -> None:
            if setting.mode == "forward":
                with torch.no_grad():
                    model.eval()(batch)
                return
            recipe = TrainConfig(task_backward=setting.task_backward)  # type: ignore[arg-type]
            accumulate_gradients(model.train(), batch, targets, recipe)

        run()
        model.zero_grad(set_to_none=True)
        _, counted = count_memory(run, CPU)
        assert plan.activations(setting) == pytest.approx(counted.peak, rel=BAR), setting


@pytest.mark.parametrize("library", product_libraries())
def test_the_forward_formula_holds_whatever_computes_products(library: str) -> None:
    """Libraries differ in what they allocate, and which is the fastest in the machine."""
    pin_products(library)
    try:
        model = small()
        plan, batch = MemoryPlan(model, TILES, no_process()), random_cases(model, TILES)
        assert plan.packs

        def run() -> Tensor:
            with torch.no_grad():
                return model.eval()(batch)

        run()
        _, counted = count_memory(run, CPU)
        assert plan.activations(Setting("forward")) == pytest.approx(counted.peak, rel=BAR)
    finally:
        pin_products(None)


def test_counting_on_one_thread_keeps_the_library_of_all() -> None:
    """The fastest on one thread may be another, which packs no weights."""
    before = product_choice()
    seen, _ = count_memory(lambda: (torch.get_num_threads(), product_choice()), CPU)
    assert seen == (1, ProductChoice(before.library, "pinned", {}))
    assert product_choice() == before
    pin_products("torch")
    try:
        assert count_memory(product_choice, CPU)[0].library == "torch"
        assert product_choice().library == "torch"
    finally:
        pin_products(None)


def test_settings_come_the_cheapest_first() -> None:
    forward = list(settings("forward", 3))
    assert [s.task_trunk for s in forward] == ["shared", "separate"]
    train = list(settings("train", 3))
    assert len(set(train)) == len(train) == 9
    work = [s.trunk_passes(3) for s in train]
    assert work == [3, 4, 5, 9, 9, 12, 12, 15, 15]
    one = list(settings("train", 1))
    assert {(s.task_trunk, s.task_backward) for s in one} == {("separate", "sequential")}
    assert "recompute" not in forward[0].to_dict()


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    return MemoryPlan(small(), 700, no_process())


def test_the_choice_follows_the_budget(plan: MemoryPlan) -> None:
    rows = plan.table(budget_mib=1e9)
    assert all(row.fits for row in rows)
    every = ("separate", "shared")
    first = cheapest(rows, "train", every)
    assert first is not None
    assert first.setting == Setting("train", "shared", "sequential", "none")
    alone = cheapest(rows, "train", ("separate",))
    assert alone is not None
    # Both are as fast; the leaner one is taken.
    assert alone.setting == Setting("train", "separate", "sequential", "none")
    assert alone.peak_mib > first.peak_mib
    leanest = min(r.peak_mib for r in rows if r.setting.mode == "train")
    tight = plan.table(budget_mib=leanest)
    found = cheapest(tight, "train", every)
    assert found is not None
    assert found.peak_mib == leanest
    assert cheapest(plan.table(budget_mib=leanest - 0.001), "train", every) is None
    assert {row.fits for row in plan.table(budget_mib=None)} == {None}


def test_more_tiles_need_more_in_a_straight_line() -> None:
    """The parts are run on a few thousand tiles, whatever is asked for."""
    sizes = (10_000, 100_000, 190_000)
    peaks = [MemoryPlan(small(), n, no_process()) for n in sizes]
    for setting in [*settings("forward", 3), *settings("train", 3)]:
        low, middle, high = (p.activations(setting) for p in peaks)
        assert high - middle == pytest.approx(middle - low, rel=0.01)
        assert high > low


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tiles": 100, "device": "cuda"},
            "one of the 0 GPUs that torch sees, got 'cuda'; use cpu",
        ),
        ({"tiles": 100, "device": "tpu7"}, "device must be cpu, cuda or cuda:N, got 'tpu7'"),
        ({"tiles": 100, "budget_gib": 0.0}, "budget must be positive, got 0.0 GiB"),
        ({"tiles": 100, "run": Path("nowhere")}, "run nowhere must hold"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=message):
        plan_report.plan(**arguments)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="one of the 2 GPUs that torch sees, got 'cuda:2'"):
        check_device("cuda:2")
    with pytest.raises(InputError, match="device must be cpu or cuda, got 'meta'"):
        check_device("meta")
    with pytest.raises(InputError, match="tiles must be at least 2 to count memory, got 1"):
        count_parts(small(), 1)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_report, "published_size_model", small)
    monkeypatch.setattr("modaltune.memory_plan.measured_process_mib", no_process)


@pytest.mark.usefixtures("little")
def test_the_command_prints_a_table_and_json() -> None:
    shown = invoke("--tiles", "300", "--budget", "4")
    assert shown.exit_code == 0, shown.output
    assert "budget: 4.00 GiB (given)" in shown.output
    assert "train: cheapest that fits: task_trunk=separate, task_backward=sequential" in (
        " ".join(shown.output.split())
    )
    told = json.loads(invoke("--tiles", "300", "--json", "--task-trunk", "any").output)
    assert told["budget_source"] == "free on this machine now"
    assert told["cheapest"]["train"]["task_trunk"] == "shared"
    assert len(told["settings"]) == 2 + 9
    only = json.loads(invoke("--tiles", "300", "--json", "--mode", "forward").output)
    assert {row["mode"] for row in only["settings"]} == {"forward"} == set(only["cheapest"])


@pytest.mark.usefixtures("little")
def test_the_command_fails_where_nothing_fits_or_is_asked_wrongly() -> None:
    none = invoke("--tiles", "300", "--budget", "0.001")
    assert none.exit_code == 1
    assert "nothing fits; take fewer tiles per case" in " ".join(none.output.split())
    assert invoke("--tiles", "1").exit_code == 2
    assert invoke("--tiles", "300", "--mode", "both").exit_code == 2
    assert invoke().exit_code == 2


def test_a_missed_prediction_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"device": "d", "torch": "2", "commit": "c", "tiles": 9, "seconds": 1}
    row |= {"mode": "forward", "task_trunk": "shared", "task_backward": "-", "recompute": "none"}
    row |= {"measured_mib": 100.0, "predicted_mib": 80.0, "ratio": 0.8, "status": "missed"}
    name = "modaltune.benchmarks.memory_plan.compare"
    monkeypatch.setattr(name, lambda *_: [row])
    words = ["--tiles", "9", "--results", str(tmp_path)]
    assert main(words) == 1
    monkeypatch.setattr(name, lambda *_: [row | {"status": "pass"}])
    assert main([*words, "--json"]) == 0
    assert (tmp_path / "memory_plan.csv").read_text().count("\n") == 3
    with pytest.raises(SystemExit) as stopped:
        main(["--tiles", "1"])
    assert stopped.value.code == 2
    assert "--tiles must be at least 2, got 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1000, 2000])
def test_predictions_meet_fresh_processes(tiles: int) -> None:
    """Published width, three blocks: what a process really needs is within the bar."""
    config = ModalTuneConfig(
        slide_encoder=LongNetConfig(depth=3), adapter=AdapterConfig(interactions=((0, 0), (1, 2)))
    )
    wanted = [
        Setting("forward", "separate"),
        Setting("train", "shared"),
        Setting("train", "separate", "joint"),
        Setting("train", "shared", "sequential", "layer"),
    ]
    for row in compare(config, wanted, tiles):
        assert row["status"] == "pass", row


def test_planned_rows_say_what_they_are_of() -> None:
    row = Planned(Setting("train", "shared", "sequential", "layer"), 2048.0, 4, True)
    report = plan_report.PlanReport(10, "cpu", 4096.0, "given", ("shared",), [row], {"train": row})
    assert report.to_dict()["cheapest"]["train"] == {
        "mode": "train",
        "task_trunk": "shared",
        "task_backward": "sequential",
        "recompute": "layer",
        "peak_gib": 2.0,
        "trunk_passes": 4,
        "fits": True,
    }
