"""The demo: whole and short here; in full, with its margins and its time, under `slow`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from modaltune.checkpoint import load_run
from modaltune.demo import DemoResult, run_demo
from modaltune.demo_study import BOTH, DemoStudy
from modaltune.errors import InputError
from modaltune.train import TrainConfig

SHORT = DemoStudy(
    folds=2,
    members=1,
    workers=1,
    width=32,
    out_features=16,
    training=TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, cases_per_step=10),
)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", cases=20, seed=3, study=SHORT)


def test_everything_is_left_where_it_says(short: DemoResult) -> None:
    result = json.loads((short.out / "result.json").read_text())
    assert result == json.loads(json.dumps(short.to_dict()))
    for name in ("report", "run", "embeddings"):
        assert Path(result[name]).exists(), name
    assert set(result["results"]) == {"image + genes", "image only", "genes only"}
    assert {"cohort", "slides", "tuning", "final model", "report"} <= set(result["stages_s"])


def test_every_output_says_synthetic_and_random(short: DemoResult) -> None:
    assert short.to_dict()["synthetic"] is True
    assert short.to_dict()["random_backbone"] is True
    page = (short.out / "report.html").read_text(encoding="utf-8")
    assert "SYNTHETIC" in page
    assert "RANDOM" in page
    assert load_run(short.out / "run").model.config.random_backbone
    table = pq.read_table(short.out / "embeddings.parquet")
    assert all(table["random_backbone"].to_pylist())
    assert (
        "SYNTHETIC" in json.loads((short.out / "run" / "run.json").read_text())["info"]["synthetic"]
    )


def test_the_model_embeds_a_case_as_the_table_says(short: DemoResult) -> None:
    table = pq.read_table(short.out / "embeddings.parquet").to_pandas()
    assert len(table) == 3 * 20
    assert set(table.task) == {"general", "diagnosis", "survival"}


def test_running_again_keeps_slides_and_features(short: DemoResult) -> None:
    slide = next((short.out / "cohort" / "slides").glob("*.tiff"))
    before = slide.stat().st_mtime_ns
    again = run_demo(short.out, cases=20, seed=3, study=SHORT)
    assert slide.stat().st_mtime_ns == before
    assert again.to_dict()["results"] == short.to_dict()["results"]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="new or empty folder, or an earlier demo's"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_another_seed_clears_what_the_demo_made_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.json").write_text('{"cases": 20, "seed": 3}')
    made = ("cohort", "features_efficientnet-lite0", "overlays", "run")
    for name in (*made, "notes"):
        (tmp_path / name).mkdir()
    for name in ("report.html", "ledger.sqlite", "ledger.sqlite-wal", "notes/mine.txt"):
        (tmp_path / name).write_text("x")

    def drawn(folder: Path, **_: object) -> None:
        assert folder == tmp_path / "cohort"
        raise KeyboardInterrupt

    monkeypatch.setattr("modaltune.demo.write_cohort", drawn)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, cases=20, seed=4, study=SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "notes"]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(InputError, match="--out must be a folder that can be written, got"):
        run_demo(Path("/proc/modaltune-demo"))


@pytest.mark.slow
def test_together_is_ahead_of_either_alone(tmp_path: Path) -> None:
    """The demo as a user runs it: image and genes together win by 0.1, within five minutes.

    The five minutes are those of two cores; others' load on them is not the demo's.
    """
    result = run_demo(tmp_path / "demo")
    others = os.getloadavg()[1] - DemoStudy().workers
    both = result.study.variants[BOTH].balanced_accuracy[0]
    alone = [v.balanced_accuracy[0] for k, v in result.study.variants.items() if k != BOTH]
    assert both - max(alone) >= 0.1
    if others < 1:
        assert result.elapsed_s <= 300
