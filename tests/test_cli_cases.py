"""`modaltune cases`: the commands as typed, their tables, JSON, and errors as messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modaltune.build_report import folder_parts
from modaltune.cases_folder import CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.cli import app
from modaltune.errors import InputError
from modaltune.planted import PlantedConfig, plant
from modaltune.testing_cohort import small_cohort
from modaltune.testing_raw_cohort import CASES, write_raw_cohort


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_raw_cohort(folder / "raw")
    return folder


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["cases", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


def inputs(raw: Path) -> list[object]:
    return [
        "--clinical", raw / "raw/clinical.tsv", "--expression", raw / "raw/xena.tsv",
        "--pathways", raw / "raw/pathways.csv", "--features", raw / "features",
        "--slides", raw / "raw/slides.csv", "--classes", "published",
    ]  # fmt: skip


def test_build_show_and_export(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "cases"
    shown = run("build", *inputs(raw), "--out", out).output
    for text in ("Left out or changed", "neither expression nor slides", "clinical.tsv", "class 0"):
        assert text in shown
    assert f"wrote {out}: 47 cases, 1 split(s)" in shown.replace("\n", "")
    folder = CasesFolder.open(out)
    shown = run("show", out).output
    assert "all parts" in shown
    assert "0 = invasive ductal carcinoma, 1 = invasive lobular carcinoma" in shown
    assert folder.sha256[:16] in shown
    described = json.loads(run("show", out, "--json").stdout)
    assert described["sha256"] == folder.sha256
    assert described["counts"][0]["all parts"]["cases"] == 47
    assert folder_parts(folder) == folder.report["parts"]
    run("export-split", out, "--out", tmp_path / "split")
    records = json.loads((tmp_path / "split" / "test.json").read_text())["data"]
    assert {record["case_submitter_id"] for record in records} == set(folder.split().test)
    with_slide = [record for record in records if record["slide_submitter_id"]]
    assert len(with_slide) > 5
    for record in with_slide:
        assert record["features_path"] == f"{record['slide_submitter_id']}.h5"
        assert record["slide_submitter_id"].startswith(record["case_submitter_id"])
    files = [tmp_path / "split" / f"{part}.json" for part in ("train", "val", "test")]
    again = run("build", "--published-split", *files, "--expression", raw / "raw/xena.tsv",
                "--out", tmp_path / "again", "--json")  # fmt: skip
    report = json.loads(again.stdout)["report"]
    assert report["parts"][0]["test"]["cases"] <= len(folder.split().test)


def test_a_folder_that_python_wrote_is_shown(tmp_path: Path) -> None:
    config = PlantedConfig(num_train=12, num_test=5, min_tiles=20, max_tiles=30, tissues=2)
    plant(config).write(tmp_path)
    for folder in (tmp_path / "cases", small_cohort(tmp_path / "small", cases=20).path):
        shown = run("show", folder).output
        assert "all parts" in shown
        assert CasesFolder.open(folder).sha256[:16] in shown
        counts = json.loads(run("show", folder, "--json").stdout)["counts"]
        assert counts[0]["all parts"]["cases"] == len(CasesFolder.open(folder).case_ids)


def test_options_reach_the_build(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "cases"
    run("build", *inputs(raw), "--out", out, "--folds", 3, "--seed", 4, "--require", "nothing",
        "--exclude", CASES[0], "--gene-aliases", "none", "--stratify", "class", "--genes", "all",
        "--unclassified", "train", "--by-site", "--val-share", 0.3)  # fmt: skip
    folder = CasesFolder.open(out)
    options = folder.description["options"]
    assert folder.num_folds == 3
    assert set(folder.case_ids) == set(CASES[1:])
    assert (options["seed"], options["stratify"], options["val_share"]) == (4, "class", 0.3)
    assert options["require"] == []
    # Every field of the request is an option of the command.
    defaults = CasesRequest().model_dump(mode="json", include=set(options))
    changed = {name for name in options if options[name] != defaults[name]}
    assert changed == {"classes", "folds", "seed", "require", "exclude", "gene_aliases", "stratify",
                       "genes", "unclassified", "by_site", "val_share"}  # fmt: skip


def test_errors_are_one_message_and_nothing_is_written(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "cases"
    absent = run("build", "--clinical", raw / "absent.tsv", "--out", out, code=1)
    assert "error:" in absent.output
    assert "no such file" in absent.output
    assert not out.exists()
    wrong = run("build", *inputs(raw), "--out", out, "--require", "stage", code=1)
    assert "require.0 must be valid, got 'stage'" in wrong.output.replace("\n", " ")
    foreign = run("show", raw, code=1)
    assert "cases.json" in foreign.output
    with pytest.raises(InputError, match="folds must be valid, got 'two'"):
        CasesRequest.checked(folds="two")


def test_the_page_names_options_and_files_that_exist(raw: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cases.md").read_text(encoding="utf-8")
    known = set(re.findall(r"--[a-z][a-z-]+", run("build", "--help").output))
    for command in ("show", "export-split"):
        known |= set(re.findall(r"--[a-z][a-z-]+", run(command, "--help").output))
    named = set(re.findall(r"--[a-z][a-z-]+", page))
    assert {"--clinical", "--by-site"} <= named
    assert named <= known
    run("build", *inputs(raw), "--out", tmp_path / "cases")
    files = set(re.findall(r"^\| `([a-z.]+)`", page.split("## What is in the folder")[1], re.M))
    assert files <= {path.name for path in (tmp_path / "cases").iterdir()}
    assert len(files) == 7
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace('"cases"', repr(str(tmp_path / "cases"))), names)
    assert names["fitted"].genes.num_cases > 0
