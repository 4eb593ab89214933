"""The planted benchmark: scores over seeds, paired differences, one tiny study end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modaltune.benchmarks import planted as benchmark
from modaltune.benchmarks.harness import append_row
from modaltune.benchmarks.planted_plot import main as draw
from modaltune.benchmarks.planted_plot import read_scores
from modaltune.benchmarks.planted_scores import Predictions, differences, interval, scores
from modaltune.engine.errors import InputError
from modaltune.evaluate import balanced_accuracy, harrell_c_index
from modaltune.planted import PlantedConfig
from modaltune.targets import Targets


def made(noise: float, seed: int, cases: int = 200) -> tuple[Targets, Predictions]:
    """Labels of some cases (always the same), and predictions with some noise."""
    rng = np.random.default_rng(0)
    classes, months = rng.integers(0, 2, cases), rng.exponential(10, cases)
    events = rng.integers(0, 2, cases).astype(float)
    own = np.random.default_rng(seed)
    probability = np.clip(classes + noise * own.normal(size=cases), 0, 1)
    risk = -months + 20 * noise * own.normal(size=cases)
    targets = Targets(
        None, torch.from_numpy(classes), torch.from_numpy(months), torch.from_numpy(events)
    )
    return targets, Predictions(probability, risk)


def test_a_score_is_the_mean_over_seeds_inside_its_interval() -> None:
    targets, first = made(0.6, 1)
    _, second = made(0.6, 2)
    found = interval("balanced_accuracy", targets, [first, second])
    each = [
        balanced_accuracy(targets.classes.numpy(), p.probability > 0.5) for p in (first, second)
    ]
    assert found[""] == pytest.approx(np.mean(each), abs=1e-12)
    assert found["_low"] < found[""] < found["_high"]
    risk = interval("c_index", targets, [first])
    want = harrell_c_index(targets.durations, targets.events, first.risk)
    assert risk[""] == pytest.approx(want, abs=1e-12)


def test_scores_are_one_row_per_metric_and_model() -> None:
    targets, first = made(0.6, 1)
    found = {("abmil", 0): first, ("abmil", 1): made(0.6, 2)[1], ("mcat", 0): first}
    rows = scores(found, targets)
    assert [(row["model"], row["metric"], row["seeds"]) for row in rows] == [
        ("abmil", "balanced_accuracy", 2),
        ("abmil", "c_index", 2),
        ("mcat", "balanced_accuracy", 1),
        ("mcat", "c_index", 1),
    ]
    want = interval("c_index", targets, [first])
    assert rows[3]["value"] == pytest.approx(want[""], abs=1e-4)
    assert rows[3]["value_low"] == pytest.approx(want["_low"], abs=1e-4)
    assert rows[3]["value_low"] < rows[3]["value"] < rows[3]["value_high"]


def test_differences_are_paired_by_patient_and_by_seed() -> None:
    targets, good = made(0.4, 1)
    found = {
        ("modaltune", 0): good,
        ("modaltune", 1): made(0.4, 2)[1],
        ("abmil", 0): made(1.5, 3)[1],
        ("copy", 0): good,
    }
    rows = differences(found, targets, ["modaltune"])
    assert [(r["metric"], r["rival"], r["seeds"]) for r in rows] == [
        ("balanced_accuracy", "abmil", 1),
        ("c_index", "abmil", 1),
        ("balanced_accuracy", "copy", 1),
        ("c_index", "copy", 1),
    ]
    worse, same = rows[0], rows[2]
    assert worse["difference"] == pytest.approx(worse["value"] - worse["rival_value"], abs=1e-4)
    assert 0 < worse["low"] < worse["difference"] < worse["high"]
    # Paired: a model against itself differs by nothing in every resample.
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


def test_predictions_come_back_for_their_own_cohort_only(tmp_path: Path) -> None:
    _, predictions = made(0.4, 1)
    path = tmp_path / "abmil-0.json"
    path.write_text(json.dumps(predictions.state({"cohort_seed": 0})), encoding="utf-8")
    read = Predictions.read(path, {"cohort_seed": 0})
    np.testing.assert_array_equal(read.probability, predictions.probability)
    np.testing.assert_array_equal(read.risk, predictions.risk)
    with pytest.raises(InputError, match="must hold predictions of"):
        Predictions.read(path, {"cohort_seed": 1})


@pytest.mark.slow
def test_every_model_trains_and_predicts_on_a_tiny_cohort() -> None:
    planted = PlantedConfig(num_train=24, num_test=10, min_tiles=20, max_tiles=30)
    for name in benchmark.MODELS:
        config = benchmark.run_config(name, epochs=1)
        study = benchmark.make_study(planted, config)
        assert len(study.train) == 24
        assert study.preprocessing.genes is not None
        predictions, cost = benchmark.train_model(study, name, config)
        assert predictions.probability.shape == predictions.risk.shape == (10,)
        assert ((predictions.probability >= 0) & (predictions.probability <= 1)).all()
        assert np.isfinite(predictions.risk).all()
        assert cost["parameters"] > 0
        assert cost["epochs"] == 1
        assert cost["seconds_per_epoch"] >= 0


@pytest.mark.slow
def test_modaltune_finds_what_is_planted_and_nothing_in_shuffled_labels() -> None:
    """Better than any predictor that sees one modality; at chance where labels are dealt anew."""
    sets = ["inputs.max_tiles=40", "model.slide_encoder.width=48"]
    sizes = {"num_train": 150, "num_test": 250, "min_tiles": 60, "max_tiles": 90}
    easy = {"pattern_share": 0.2, "pathways": 6, "genes_per_pathway": 6, "seed": 3}
    for shuffled in (False, True):
        config = benchmark.run_config("modaltune_shared", epochs=16, sets=sets)
        planted = PlantedConfig.model_validate({**sizes, **easy, "shuffle_labels": shuffled})
        study = benchmark.make_study(planted, config)
        predictions, _ = benchmark.train_model(study, "modaltune_shared", config)
        best = study.planted.facts()["best_test_scores"]
        for metric in ("balanced_accuracy", "c_index"):
            score = interval(metric, study.test_targets, [predictions])
            if shuffled:  # three standard errors of 250 cases, of which half can be compared
                assert score[""] == pytest.approx(0.5, abs=0.11), metric
            else:
                alone = max(best[seen][metric] for seen in ("image", "genes"))
                assert score[""] > alone, metric
                assert score["_low"] > 0.6, metric


@pytest.mark.slow
def test_a_rival_finds_it_and_nothing_in_shuffled_labels() -> None:
    sizes = {"num_train": 100, "num_test": 200, "min_tiles": 40, "max_tiles": 60}
    config = benchmark.run_config("late_fusion", epochs=12)
    for shuffled in (False, True):
        planted = PlantedConfig(**sizes, pattern_share=0.2, shuffle_labels=shuffled)
        study = benchmark.make_study(planted, config)
        predictions, _ = benchmark.train_model(study, "late_fusion", config)
        for metric in ("balanced_accuracy", "c_index"):
            score = interval(metric, study.test_targets, [predictions])
            if shuffled:  # three standard errors of 200 cases, of which half can be compared
                assert score[""] == pytest.approx(0.5, abs=0.12), metric
            else:
                assert score["_low"] > 0.5, metric


def test_what_was_predicted_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of differences are written from predictions that are there; nothing is trained."""
    out, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    out.mkdir()
    key = {"cohort_seed": 1, "shuffled": False, "settings": "epochs=3"}
    for number, name in enumerate(("modaltune", "abmil")):
        state = made(0.3 + number, number, cases=400)[1].state(key)
        (out / f"{name}-0.json").write_text(json.dumps(state), encoding="utf-8")
    given = ["--seeds", "0", "--models", "modaltune", "abmil", "--epochs", "3"]
    given += ["--out", str(out), "--results", str(results)]
    assert benchmark.main(given) == 0
    with (results / benchmark.DIFFERENCES_NAME).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == ["balanced_accuracy", "c_index"]
    assert not (results / benchmark.CSV_NAME).exists()
    with (results / benchmark.SCORES_NAME).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["modaltune", "modaltune", "abmil", "abmil"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    assert benchmark.main([*given, "--plant", "grade=3"]) == 1
    assert "--plant must set fields of PlantedConfig, got grade" in capsys.readouterr().err
    assert benchmark.main([*given, "--shuffled"]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_the_picture_shows_the_last_rows_of_the_reported_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / benchmark.SCORES_NAME
    common = {"cohort_seed": 2, "shuffled": False, "settings": "", "model": "abmil"}
    ends = {"value_low": 0.6, "value_high": 0.7}
    for value, changed in ((0.1, {}), (0.65, {}), (0.2, {"settings": "epochs=1"})):
        for metric in ("balanced_accuracy", "c_index"):
            append_row(path, {**common, **changed, "metric": metric, "value": value, **ends})
    for metric in ("balanced_accuracy", "c_index"):
        row = {**common, "shuffled": True, "metric": metric, "value": 0.62, **ends}
        append_row(path, row)
    rows = read_scores(path, cohort_seed=2, shuffled=False)
    assert [row["value"] for row in rows] == [0.65, 0.65]
    assert read_scores(path, cohort_seed=1, shuffled=False) == []
    out = tmp_path / "images" / "planted.png"
    given = ["--results", str(tmp_path), "--cohort-seed", "2", "--out", str(out)]
    assert draw(given) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes()[:4] == b"\x89PNG"
