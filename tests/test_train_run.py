"""Training from cases folders: what is fitted on whom, several sites, missing inputs, limits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from modaltune import load_run
from modaltune.cases_folder import CasesContent, CasesFolder, write_cases_folder
from modaltune.cli import app
from modaltune.config_text import to_toml
from modaltune.errors import CohortError, InputError, WeightsError
from modaltune.run_config import load_run_config
from modaltune.slide_encoders.longnet import LongNet
from modaltune.splits import Split
from modaltune.targets import Targets
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train_cases import pool_cases
from modaltune.train_prepare import build_model, prepare
from modaltune.train_run import run_training
from modaltune.validation import validate


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"))


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def test_a_run_folder_holds_everything(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_run_config([cases], out, "inputs.clinical=default")
    run = run_training(config)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "run.json", "model.safetensors", "config.toml", "split.json", "metrics.jsonl",
        "checkpoints",
    }  # fmt: skip
    assert load_run_config(out / "config.toml") == config
    folder = CasesFolder.open(cases)
    split = Split.from_dict(json.loads((out / "split.json").read_text()))
    assert split == folder.split(0)
    again = load_run(out)
    assert again.info["cases"] == [{"path": str(cases), "sha256": folder.sha256, "fold": 0}]
    assert again.info["random_backbone"]
    assert again.model.config.random_backbone
    assert again.model.config.clinical_features == len(run.preprocessing.clinical.feature_names)
    assert again.projector is not None
    case = again.case("X", [], folder.expression.loc["P000"])
    assert torch.equal(again.embed([case]), run.embed([case]))
    steps = records(out, "step")
    assert [r["steps"] for r in steps] == list(range(1, 16))
    (end,) = records(out, "end")
    assert 0 < end["busy"] <= 1
    assert end["compute_s"] + end["waited_s"] + end["other_s"] > 0
    with pytest.raises(InputError, match=r"output.folder must not hold a finished run"):
        run_training(config)


def test_the_loss_falls_and_validation_learns_what_can_be_learned(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path, parts=(40, 20, 0))
    sets = ("training.epochs=12", "training.lr=1e-2", "inputs.image=false")
    run_training(tiny_run_config([cases], tmp_path / "run", *sets))
    epochs = records(tmp_path / "run", "epoch")
    assert epochs[-1]["loss"] < 0.6 * epochs[0]["loss"]
    assert max(r["balanced_accuracy"] for r in records(tmp_path / "run", "validation")) >= 0.9


def test_several_folders_are_one_pan_cancer_run(cases: Path, tmp_path: Path) -> None:
    other = write_training_cases(tmp_path / "other", seed=3, prefix="Q")
    both = {**_text(cases), **_text(other)}
    from modaltune.text_embeddings import PrecomputedText

    PrecomputedText(both).save(tmp_path / "both.safetensors")
    out = tmp_path / "run"
    embeddings = f"text.embeddings={str(tmp_path / 'both.safetensors')!r}"
    run = run_training(tiny_run_config([cases, other], out, embeddings))
    assert len(run.info["cases"]) == 2
    assert len(run.info["trained_on"]) == 20
    (first, *_) = records(out, "validation")
    assert set(first["sites"]) == {"0", "1"}
    means = [first["sites"][s]["balanced_accuracy"] for s in ("0", "1")]
    assert first["balanced_accuracy"] == pytest.approx(np.mean(means))
    assert 0 <= first["site_balanced_accuracy"] <= 1
    with pytest.raises(CohortError, match=r"in one of the cases folders, got 20 in several: P000"):
        pool_cases([CasesFolder.open(cases)] * 2)
    with pytest.raises(CohortError, match="at least one cases folder, got none"):
        pool_cases([])


def _text(cases: Path) -> dict[str, torch.Tensor]:
    from modaltune.text_embeddings import PrecomputedText

    return PrecomputedText.load(cases.parent / "text.safetensors").embeddings


def changed_outside_training(cases: Path, folder: Path) -> Path:
    """Write the same cases with other genes, labels and ages for validation and test."""
    opened = CasesFolder.open(cases)
    split = opened.split(0)
    outside = [*split.val, *split.test]
    rng = np.random.default_rng(9)
    clinical, expression = opened.clinical.copy(), opened.expression.copy()
    rows = [case for case in outside if case in expression.index]
    expression.loc[rows] = rng.normal(50, 9, (len(rows), expression.shape[1])).astype(np.float32)
    clinical.loc[outside, "age"] = rng.uniform(90, 99, len(outside))
    clinical.loc[outside, "survival_months"] = rng.uniform(500, 900, len(outside))
    clinical.loc[outside, "stage"] = "Stage IV"
    clinical.loc[outside, "site"] = "brain"
    clinical.loc[outside, "primary_class"] = 1 - clinical.loc[outside, "primary_class"]
    slides = pq.read_table(cases / "slides.parquet").to_pandas()
    content = CasesContent(clinical, expression, opened.pathways, slides, [split])
    return write_cases_folder(folder, content).path


@pytest.mark.parametrize("clinical", ["default", "published"])
def test_nothing_outside_the_training_split_changes_what_is_fitted(
    clinical: str, cases: Path, tmp_path: Path
) -> None:
    other = changed_outside_training(cases, tmp_path / "cases")
    text = f"text.embeddings={str(cases.parent / 'text.safetensors')!r}"
    sets = (text, f"inputs.clinical={clinical}")
    one = prepare(tiny_run_config([cases], tmp_path / "run", *sets))
    two = prepare(tiny_run_config([other], tmp_path / "run", *sets))
    assert one.run.preprocessing.to_dict() == two.run.preprocessing.to_dict()
    for name, tensor in one.run.model.state_dict().items():
        assert torch.equal(tensor, two.run.model.state_dict()[name]), name
    a, b = one.train.all_targets, two.train.all_targets
    assert a is not None
    assert b is not None
    assert torch.equal(a.text, b.text)
    assert one.facts["frozen_weights"] == two.facts["frozen_weights"]
    published = prepare(
        tiny_run_config([other], tmp_path / "run", *sets, "inputs.fit_on=published")
    )
    assert published.run.preprocessing.to_dict() != two.run.preprocessing.to_dict()
    assert published.run.info["fit_on"] == "published"


def test_the_sentences_of_training_cases_do_not_depend_on_others(
    cases: Path, tmp_path: Path
) -> None:
    """With the offline text encoder: its survival bins are of the training split."""
    other = changed_outside_training(cases, tmp_path / "cases")
    targets = []
    for folder in (cases, other):
        config = tiny_run_config([folder], tmp_path / "run", "text.embeddings=none")
        targets.append(prepare(config).train.all_targets)
    assert torch.equal(targets[0].text, targets[1].text)
    assert targets[0].text.shape == (10, 3, 10)
    norms = targets[0].text.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_stage_as_input_and_target_is_warned_about(
    cases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        leaky = prepare(tiny_run_config([cases], tmp_path / "run", "inputs.clinical=published"))
    assert "they leak the label" in caplog.text
    assert leaky.run.info["stage_leak"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tasks = 'model.tasks=["diagnosis"]'  # its sentence holds no stage
        clean = prepare(
            tiny_run_config([cases], tmp_path / "run", "inputs.clinical=published", tasks)
        )
        prepare(tiny_run_config([cases], tmp_path / "run", "inputs.clinical=default"))
    assert "leak" not in caplog.text
    assert not clean.run.info["stage_leak"]


def test_missing_inputs_are_left_out_case_by_case(cases: Path, tmp_path: Path) -> None:
    ready = prepare(tiny_run_config([cases], tmp_path / "run"))
    batch = ready.train.batch(range(len(ready.train)))
    ids = list(batch.case_ids)
    counts = dict(zip(ids, batch.offsets.diff().tolist(), strict=True))
    assert counts["P006"] == 0  # no slide
    slides = CasesFolder.open(cases).slides.set_index("slide")["tiles"]
    assert counts["P004"] == slides["P004-A"] + slides["P004-B"]  # two slides
    genes = dict(zip(ids, batch.present["genes"].tolist(), strict=True))
    assert [case for case, has in genes.items() if not has] == ["P005"]
    image_only = prepare(tiny_run_config([cases], tmp_path / "run", "inputs.genes=false"))
    assert image_only.train.without_inputs == ("P006",)
    assert image_only.run.info["left_out"] == {"train": ["P006"], "val": ["P013"]}
    assert image_only.train.all_targets is not None
    assert len(image_only.train.all_targets) == len(image_only.train) == 9
    genes_only = prepare(tiny_run_config([cases], tmp_path / "run", "inputs.image=false"))
    assert genes_only.train.without_inputs == ("P005",)
    assert genes_only.train.batch([0]).tiles.shape[0] == 0


def test_the_limit_of_tiles_is_recorded(cases: Path, tmp_path: Path) -> None:
    full = prepare(tiny_run_config([cases], tmp_path / "run", "inputs.tile_limit=all"))
    some = prepare(tiny_run_config([cases], tmp_path / "run", "inputs.max_tiles=4"))
    whole, part = full.train.batch([4]), some.train.batch([4])
    assert part.tiles.shape[0] == 4 < whole.tiles.shape[0]
    kept = [i for i, row in enumerate(whole.tiles.tolist()) if row in part.tiles.tolist()]
    assert torch.equal(whole.tiles[kept], part.tiles)
    # Where a tile lies does not depend on which others are kept.
    assert torch.equal(whole.positions_px[kept], part.positions_px)
    recorded = some.run.info["tile_limit"]
    assert (recorded["policy"], recorded["max_tiles"], recorded["seed"]) == ("random", 4, 0)
    assert recorded["limited"]["P004"] == (4, whole.tiles.shape[0])


def test_weights_are_needed_unless_a_random_encoder_is_asked_for(
    cases: Path, tmp_path: Path
) -> None:
    config = tiny_run_config([cases], tmp_path / "run", "model.random_backbone=false")
    with pytest.raises(WeightsError, match=r"model.weights must be the path.*got none"):
        prepare(config)
    genes_only = tiny_run_config(
        [cases], tmp_path / "run", "model.random_backbone=false", "inputs.image=false"
    )
    assert prepare(genes_only).run.model.config.random_backbone


def test_published_weights_are_loaded_and_must_fit_the_features(
    cases: Path, tmp_path: Path
) -> None:
    from modaltune.reference_import import encoder_rules, to_published

    base = tiny_run_config([cases], tmp_path / "run", "model.slide_encoder.in_features=6")
    torch.manual_seed(4)
    encoder = LongNet(base.model.slide_encoder)
    published = to_published(encoder_rules("", encoder), encoder.state_dict())
    torch.save({"model": dict(published)}, tmp_path / "slide_encoder.pth")
    weights = f"model.weights={str(tmp_path / 'slide_encoder.pth')!r}"
    sets = ("model.random_backbone=false", weights, "model.start=published")
    config = tiny_run_config([cases], tmp_path / "run", *sets, "model.slide_encoder.in_features=6")
    model = prepare(config).run.model
    assert not model.config.random_backbone
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.slide_encoder.state_dict()[name], tensor), name
    wrong = tiny_run_config([cases], tmp_path / "run", *sets)
    with pytest.raises(InputError, match=r"in_features must be the features' width 6, got 1280"):
        build_model(wrong, prepare(config).run.preprocessing)


def test_training_stops_early_when_validation_gets_no_better(cases: Path, tmp_path: Path) -> None:
    sets = ("training.epochs=30", "training.early_stop=2", "training.validate_every=2")
    run = run_training(tiny_run_config([cases], tmp_path / "run", *sets, "training.lr=1e-5"))
    found = records(tmp_path / "run", "validation")
    assert run.info["epochs"] < 30
    values = [r["balanced_accuracy"] for r in found]
    assert max(values[-2:]) <= max(values[:-2])
    assert [r["epoch"] for r in found] == list(range(1, run.info["epochs"], 2))


def test_cases_given_by_a_relative_path_are_found_from_anywhere(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(cases.parent)
    sets = ("cases.folders=['cases']", "training.epochs=1", "training.warmup_epochs=1")
    with caplog.at_level(logging.WARNING):
        run = run_training(tiny_run_config([cases], tmp_path / "run", *sets))
    assert run.info["cases"][0]["path"] == str(cases)
    assert "warmup_epochs = 1 is not shorter than training.epochs = 1" in caplog.text


def test_validation_figures_are_those_of_the_probes() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 2
    x = rng.normal(size=(60, 4)) + classes[:, None]
    months = rng.exponential(20, 60)

    def targets(part: slice) -> Targets:
        return Targets(
            None, torch.from_numpy(classes[part]), torch.from_numpy(months[part]),
            torch.ones(len(classes[part])),
        )  # fmt: skip

    own, other = slice(0, 40), slice(40, 60)
    found = validate(x[own], x[other], targets(own), targets(other), [0] * 40, [0] * 20)
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    model = LogisticRegression(solver="liblinear", max_iter=200, random_state=0)
    predicted = model.fit(x[own], classes[own]).predict(x[other])
    want = balanced_accuracy_score(classes[other], predicted)
    assert found["balanced_accuracy"] == pytest.approx(want)
    assert 0 <= found["c_index"] <= 1
    assert len(found["recall"]) == len(found["f1"]) == 2
    nobody = Targets(None, torch.full((40,), -1), torch.full((40,), float("nan")),
                     torch.full((40,), float("nan")))  # fmt: skip
    empty = validate(x[own], x[other], nobody, targets(other), [0] * 40, [0] * 20)
    assert (empty["balanced_accuracy"], empty["c_index"]) == (None, None)


def test_the_command_prints_every_field_trains_and_says_what_it_kept(
    cases: Path, tmp_path: Path
) -> None:
    runner = CliRunner()
    printed = runner.invoke(app, ["train", "--print-config", "--preset", "small"])
    assert printed.exit_code == 0
    assert "random_backbone = true" in printed.stdout
    assert "# tiles of a case under the limit" in printed.stdout
    path = tmp_path / "train.toml"
    path.write_text(to_toml(tiny_run_config([cases], tmp_path / "run")))
    words = ["train", str(path), "--out", str(tmp_path / "other"), "--set", "training.epochs=1"]
    done = runner.invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["out"] == str(tmp_path / "other")
    assert told["epochs"] == 1
    assert told["random_backbone"]
    refused = runner.invoke(app, [*words, "--json"])
    assert refused.exit_code == 1
    assert "must not hold a finished run" in " ".join(refused.stderr.split())
    bad = runner.invoke(app, ["train", str(path), "--set", "training.epochs=-1"])
    assert bad.exit_code == 1
    assert "training.epochs must be greater than 0, got -1" in " ".join(bad.stderr.split())


def test_what_is_not_installed_says_how_to_get_it(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for package, sets in (
        ("tensorboard", "output.tensorboard=true"),
        ("wandb", "output.wandb=study"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        config = tiny_run_config([cases], tmp_path / package, sets)
        with pytest.raises(InputError, match=rf"pip install 'modaltune\[{package}\]'"):
            run_training(config)


def test_clinical_rows_without_survival_or_class_still_train(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path)
    opened = CasesFolder.open(cases)
    clinical = opened.clinical.copy()
    clinical[["survival_months", "event"]] = np.nan
    clinical["primary_class"] = -1
    slides = pd.DataFrame(pq.read_table(cases / "slides.parquet").to_pandas())
    content = CasesContent(clinical, opened.expression, opened.pathways, slides, [opened.split(0)])
    bare = write_cases_folder(tmp_path / "bare", content).path
    run = run_training(tiny_run_config([bare], tmp_path / "run"))
    assert run.info["chosen"]["by"] is None
    assert run.info["chosen"]["epoch"] == 3  # nothing to choose by: the last
