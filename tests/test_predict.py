"""`modaltune predict` on small real files: every format, missing modalities, no refitting."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import modaltune
from modaltune.cases_folder import CasesFolder
from modaltune.cli import app
from modaltune.errors import CheckpointError, CohortError, InputError
from modaltune.fitted_probes import fit_probes
from modaltune.predict import PredictRequest, predict_request, predict_table
from modaltune.probe_files import load_probes
from modaltune.result_rows import BootstrapOptions
from modaltune.run_evaluation import EvaluateRequest, evaluate_run
from modaltune.testing_cohort import GENES, TASKS, small_cohort, small_run

PAGE = Path(__file__).parents[1] / "docs" / "evaluate.md"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[CasesFolder, Path]:
    """A cohort and an evaluated run; the features lie in `cases-features`."""
    folder = tmp_path_factory.mktemp("study")
    cases = small_cohort(folder / "cases", cases=60)
    run = small_run(folder / "run", cases)
    quick = BootstrapOptions(resamples=0)
    evaluate_run(EvaluateRequest(run=run, bootstrap=quick, pictures=False))
    return cases, run


@pytest.fixture(scope="module")
def new_cases(study: tuple[CasesFolder, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New patients: N1 has slide and genes, N2 a slide, N3 genes, N4 a clinical row alone."""
    folder = tmp_path_factory.mktemp("new")
    features = study[0].path.parent / "cases-features"
    (folder / "features").mkdir()
    for name, source in (("N1-a", "P000-S"), ("N2", "P002-S")):
        shutil.copy(features / f"{source}.h5", folder / "features" / f"{name}.h5")
    (folder / "slides.csv").write_text("slide,case_id\nN1-a.svs,N1\n")
    rng = np.random.default_rng(7)
    genes = pd.DataFrame(rng.normal(size=(2, len(GENES))), ["N3", "N1"], list(GENES))
    genes.rename_axis("case_id").to_csv(folder / "genes.csv")
    (folder / "clinical.csv").write_text("case_id,age,site\nN4,60,breast\nN1,55,breast\n")
    return folder


def _arguments(run: Path, new: Path, out: Path) -> list[str]:
    return [
        "predict", str(run), "--features", str(new / "features"),
        "--slides", str(new / "slides.csv"), "--expression", str(new / "genes.csv"),
        "--clinical", str(new / "clinical.csv"), "--out", str(out), "--json",
    ]  # fmt: skip


def test_new_cases_with_missing_modalities(study: Any, new_cases: Path, tmp_path: Path) -> None:
    run = study[1]
    before = {name: (run / name).read_bytes() for name in ("probes.json", "probes.safetensors")}
    said = CliRunner().invoke(app, _arguments(run, new_cases, tmp_path / "p.parquet"))
    assert said.exit_code == 0, said.output
    summary = json.loads(said.stdout)
    assert summary["cases_by_inputs"] == {"genes": 1, "slide": 1, "slide+genes": 1}
    assert summary["without_inputs"] == ["N4"]
    table = pq.read_table(tmp_path / "p.parquet")
    frame = table.to_pandas()
    assert list(zip(frame["case_id"], frame["task"], strict=True)) == [
        (case, task) for case in ("N1", "N2", "N3") for task in TASKS
    ]
    assert list(frame["modalities"][::3]) == ["slide+genes", "slide", "genes"]
    np.testing.assert_allclose(frame[["class_0", "class_1"]].sum(axis=1), 1)
    survival = frame[[c for c in frame if c.startswith("survival_")]].to_numpy()
    assert survival.shape[1] >= 3
    assert (np.diff(survival, axis=1) <= 0).all()
    assert set(frame["risk_group"]) <= {"low", "high"}
    assert frame["random_backbone"].all()
    about = json.loads(table.schema.metadata[b"modaltune"])
    assert about["probes"]["cases_sha256"] == study[0].sha256
    for name, content in before.items():
        assert (run / name).read_bytes() == content


def test_a_case_alone_is_predicted_as_among_others(
    study: Any, new_cases: Path, tmp_path: Path
) -> None:
    """From Python, from a table of one, and among others: the same numbers."""
    run_folder = study[1]
    together = tmp_path / "p.csv"
    CliRunner().invoke(app, _arguments(run_folder, new_cases, together))
    frame = pd.read_csv(together)
    run, probes = modaltune.load_run(run_folder), modaltune.load_probes(run_folder)
    genes = pd.read_csv(new_cases / "genes.csv", index_col="case_id").loc["N1"]
    case = run.case("N1", [new_cases / "features" / "N1-a.h5"], genes)
    alone = modaltune.predict_table(probes, ["N1"], run.embed([case]))
    own = frame[frame["case_id"] == "N1"].reset_index(drop=True)
    for name in alone.columns:
        if alone[name].dtype.kind == "f":
            np.testing.assert_allclose(own[name], alone[name], rtol=1e-5)
        else:
            assert list(own[name]) == list(alone[name])
    embedding = own[[c for c in own if c.startswith("embedding_")]].to_numpy()
    np.testing.assert_allclose(embedding, run.embed([case])[0].numpy(), rtol=1e-5, atol=1e-7)


def test_h5ad_has_a_row_per_case(study: Any, new_cases: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    CliRunner().invoke(app, _arguments(study[1], new_cases, tmp_path / "p.h5ad"))
    CliRunner().invoke(app, _arguments(study[1], new_cases, tmp_path / "p.csv"))
    data, frame = anndata.read_h5ad(tmp_path / "p.h5ad"), pd.read_csv(tmp_path / "p.csv")
    assert list(data.obs_names) == ["N1", "N2", "N3"]
    assert sorted(data.obsm) == [f"X_{task}" for task in sorted(TASKS)]
    np.testing.assert_array_equal(data.X, data.obsm["X_general"])
    own = frame[frame["task"] == "survival"]
    np.testing.assert_allclose(data.obs["survival_risk"], own["risk"], rtol=1e-5)
    assert json.loads(data.uns["modaltune"])["random_backbone"]


def test_a_cases_folder_gives_what_evaluation_gave(study: Any, tmp_path: Path) -> None:
    cases, run = study
    out = tmp_path / "p.parquet"
    predict_request(PredictRequest(run=run, out=out, cases=cases.path))
    got = pd.read_parquet(out).set_index(["case_id", "task"])
    evaluated = pd.read_parquet(run / "evaluation" / "predictions.parquet")
    want = evaluated[evaluated["split"] == "test"].set_index(["case_id", "task"])
    assert len(want) > 30
    for name in ("class_1", "risk"):
        np.testing.assert_allclose(got.loc[want.index, name], want[name], rtol=1e-6)


def test_several_sites_and_unknown_ones() -> None:
    rng = np.random.default_rng(0)
    x, n = rng.normal(size=(80, 2, 4)), 80
    labels = pd.DataFrame(
        {
            "primary_class": rng.integers(0, 2, n),
            "survival_months": rng.uniform(13, 60, n),
            "event": rng.integers(0, 2, n) * 1.0,
            "site": ["lung", "breast"] * 40,
        }
    )
    fitted = fit_probes(x, ("a", "b"), labels)
    table = predict_table(
        fitted, ["1", "2", "3"], x[:3], sites=["breast", "", "skin"], months=[12, 1000]
    )
    assert list(table["case_id"]) == ["1", "1", "2", "2", "3", "3"]
    assert list(table["scope"]) == ["breast", "breast", *["pooled"] * 4]
    assert table["class_1"].notna().tolist() == [True, True, *[False] * 4]
    assert table["risk"].notna().all()
    assert table["survival_1000m"].isna().all()
    np.testing.assert_allclose(table["site_breast"] + table["site_lung"], 1)
    with pytest.raises(InputError, match=r"sites must have one entry per case \(3\), got 1"):
        predict_table(fitted, ["1", "2", "3"], x[:3], sites=["breast"])


def test_refusals(study: Any, new_cases: Path, tmp_path: Path) -> None:
    run = study[1]
    features = (new_cases / "features",)
    with pytest.raises(InputError, match=r"must end in \.parquet, \.csv, \.h5ad, got p\.xlsx"):
        predict_request(PredictRequest(run=run, out=tmp_path / "p.xlsx", features=features))
    out = tmp_path / "p.csv"
    with pytest.raises(InputError, match="must be given, got none"):
        predict_request(PredictRequest(run=run, out=out))
    with pytest.raises(InputError, match=r"device must be one of the .* GPUs that torch sees"):
        predict_request(PredictRequest(run=run, out=out, features=features, device="cuda:99"))
    with pytest.raises(InputError, match="--cases must stand alone"):
        predict_request(PredictRequest(run=run, out=out, features=features, cases=study[0].path))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for name in ("probes.json", "probes.safetensors"):
        (other / name).unlink()
    with pytest.raises(CheckpointError, match="fit them with: modaltune evaluate"):
        predict_request(PredictRequest(run=other, out=out, features=features))
    changed = small_run(tmp_path / "seed1", study[0], seed=1)
    with pytest.raises(CheckpointError, match="got probes of other weights"):
        predict_request(PredictRequest(run=changed, out=out, features=features, probes=run))
    (tmp_path / "ages.csv").write_text("case_id,age\nP1,50\n")
    with pytest.raises(CohortError, match=r"cases must hold something .* got none of 1 cases: P1"):
        predict_request(PredictRequest(run=run, out=out, clinical=tmp_path / "ages.csv"))
    short = pd.read_csv(new_cases / "genes.csv").drop(columns="G5")
    short.to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(CohortError, match=r"1 missing \(G5\)"):
        predict_request(PredictRequest(run=run, out=out, expression=tmp_path / "short.csv"))
    summary = predict_request(
        PredictRequest(run=run, out=out, expression=tmp_path / "short.csv", missing_genes="mean")
    )
    assert summary["cases"] == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_example_of_the_page(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, run = study
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "features").mkdir()
    shutil.copy(cases.path.parent / "cases-features" / "P000-S.h5",
                tmp_path / "features" / "P001-S.h5")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in example.splitlines() if line.strip()]) <= 6
    exec(example, {"genes": dict.fromkeys(GENES, 0.5)})
    said = capsys.readouterr().out
    assert "survival_24m" in said
    for task in TASKS:
        assert task in said
    assert load_probes(run).tasks == TASKS
