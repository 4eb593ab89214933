"""The command line: help, exit codes 0 / 1 / 2, JSON, and bad input by its message."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import modaltune
from modaltune.adapter import AdapterConfig
from modaltune.checkpoint import Run, save_run
from modaltune.cli import app
from modaltune.config import ModalTuneConfig
from modaltune.engine.encoders.registry import DEFAULT_ENCODER
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.store import open_features
from modaltune.gene_scaler import GeneScaler
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.slide_encoders.longnet import LongNetConfig


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    """Everything printed, on one line."""
    return re.sub(r"\s+", " ", result.output)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def pink(path: Path, mpp: float | None = 0.5, value: int | None = None) -> Path:
    rng = np.random.default_rng(1)
    rgb = rng.integers(100, 190, (512, 512, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    if value is not None:
        rgb[:] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(path, rgb, mpp=mpp)
    return path


GENES = ("EGFR", "ESR1", "TP53")


def small_run(folder: Path, **changes: object) -> Path:
    """A tiny run that takes the default encoder's features."""
    torch.manual_seed(0)
    index = PathwayIndex.build(PathwayTable(("A", "B"), (GENES[:2], GENES[1:])), GENES)
    train = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=list(GENES))
    config = ModalTuneConfig(
        slide_encoder=LongNetConfig(
            in_features=1280, width=32, depth=2, heads=4, ffn_width=64, grid_cells=64
        ),
        adapter=AdapterConfig(heads=4, interactions=((0, 0), (1, 1))),
        genes=GeneConfig(width=8, depth=1, tokens=2),
        out_features=16,
        random_backbone=True,
    )
    model = ModalTune(config, gene_index=index.indices, gene_offsets=index.offsets).eval()
    recipe = open_features(next((folder.parent / "seed").rglob("*.h5")))
    tiles = TileRecipe.of(recipe) if not changes else TileRecipe(**{"width": 1280, **changes})
    save_run(folder, Run(model, Preprocessing(tiles, index, GeneScaler.fit(train))))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    slide = pink(folder / "slides" / "seed.tiff")
    assert run("embed", slide, "--out", folder / "seed", "--no-overlays").exit_code == 0
    return small_run(folder / "run")


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["doctor"], ["slides", "info"], ["embed"], ["status"], ["retry"],
                ["golden"], ["import-checkpoint"]]
)  # fmt: skip
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    assert run("--version").output.strip() == f"modaltune {modaltune.__version__}"


@pytest.mark.parametrize(
    "words",
    [
        ["embed"],
        ["embed", "--nonsense"],
        ["embed", "a.svs", "--manifest", "m.csv"],
        ["embed", "a.svs", "--genes", "g.csv"],
        ["golden"],
        ["slides", "info"],
        ["nothing"],
    ],
)
def test_usage_errors_exit_2(words: list[str]) -> None:
    assert run(*words).exit_code == 2


def test_slides_info(tmp_path: Path) -> None:
    slide = pink(tmp_path / "a.tiff")
    result = run("slides", "info", slide, tmp_path / "none.svs", "--json")
    assert result.exit_code == 1
    good, bad = json.loads(result.stdout)
    assert good["mpp"] == pytest.approx(0.5)
    assert good["dimensions"] == [512, 512]
    assert "none.svs" in bad["error"]
    table = run("slides", "info", slide)
    assert table.exit_code == 0
    assert "0.5000 mpp" in table.output


def test_embed_slides_and_resume(tmp_path: Path) -> None:
    slide = pink(tmp_path / "a.tiff")
    words = ["embed", slide, "--out", tmp_path / "out", "--json"]
    first = run(*words)
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["counts"]["done"] == 1
    assert report["tiles"] == 4
    assert set(report["stages_s"]) >= {"open", "mask", "decode", "encode", "write", "idle"}
    assert json.loads(run(*words).stdout)["counts"]["kept"] == 1
    assert files(tmp_path / "out") == {
        "features_efficientnet-lite0/a.h5",
        "ledger.sqlite",
        "overlays/a.png",
        "report.json",
    }


def test_embed_with_a_model(tmp_path: Path, trained: Path) -> None:
    pink(tmp_path / "s1.tiff")
    pink(tmp_path / "s2.tiff")
    (tmp_path / "manifest.csv").write_text("slide,case_id\ns1.tiff,P1\ns2.tiff,P1\n")
    genes = pd.DataFrame([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], ["P1", "P2"], list(GENES))
    genes.to_csv(tmp_path / "genes.csv", index_label="case_id")
    result = run(
        "embed", "--manifest", tmp_path / "manifest.csv", "--out", tmp_path / "out",
        "--model", trained, "--genes", tmp_path / "genes.csv", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["random_backbone"] is True
    table = pq.read_table(tmp_path / "out" / "embeddings.parquet").to_pandas()
    assert list(zip(table.case_id, table.task, strict=True)) == [
        (case, task) for case in ("P1", "P2") for task in ("general", "diagnosis", "survival")
    ]
    assert [list(used) for used in table.modalities[::3]] == [["slide", "genes"], ["genes"]]
    assert table.random_backbone.all()
    assert list(table.tiles[::3]) == [8, 0]
    run_again = modaltune.load_run(trained)
    case = run_again.case(
        "P1",
        slides=[tmp_path / "out" / "features_efficientnet-lite0" / f"{s}.h5" for s in ("s1", "s2")],
        genes={"EGFR": 1.0, "ESR1": 2.0, "TP53": 3.0},
    )
    want = run_again.embed([case])[0].numpy()
    np.testing.assert_allclose(np.stack(table.embedding[:3]), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"Dear diary, this is not a slide.\n" * 30, "no reader")],
)
def test_files_that_are_no_slides(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.svs").write_bytes(content)
    result = run("embed", tmp_path / "x.svs", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "x.svs" in said(result)
    assert message in said(result).lower() or "must" in said(result)
    assert files(tmp_path / "out") == {"ledger.sqlite", "report.json"}


@pytest.mark.shared
@pytest.mark.parametrize("percent", [10, 50, 99])
def test_truncated_slides(tmp_path: Path, shared_dir: Path, percent: int) -> None:
    whole = (shared_dir / "data" / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) * percent // 100])
    result = run("embed", tmp_path / "cut.svs", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "truncated" in said(result)
    assert files(tmp_path / "out") == {"ledger.sqlite", "report.json"}


def test_slides_without_mpp(tmp_path: Path) -> None:
    slide = pink(tmp_path / "a.tiff", mpp=None)
    result = run("embed", slide, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "a.tiff" in said(result)
    assert "--base-mpp" in said(result)
    assert run("embed", slide, "--out", tmp_path / "out", "--base-mpp", 0.5).exit_code == 0


@pytest.mark.parametrize("mpp", ["0", "1e6", "-1", "nan"])
def test_absurd_mpp(tmp_path: Path, mpp: str) -> None:
    slide = pink(tmp_path / "a.tiff", mpp=None)
    result = run("embed", slide, "--out", tmp_path / "out", "--base-mpp", mpp)
    assert result.exit_code == 1
    assert "--base-mpp must lie in 0.05..5" in said(result)
    assert not (tmp_path / "out").exists()


def test_zero_tissue_is_a_status_not_a_failure(tmp_path: Path) -> None:
    slide = pink(tmp_path / "blank.tiff", value=255)
    result = run("embed", slide, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0
    (entry,) = json.loads(result.stdout)["slides"]
    assert entry["status"] == "empty"
    assert "tissue" in entry["reason"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.tiff,P\na.tiff,Q\n", "distinct names"),
        ("none.tiff,P\n", "existing files"),
        ("../a.tiff,P\n", "must lie below"),
    ],
)
def test_bad_manifests_write_nothing(tmp_path: Path, rows: str, message: str) -> None:
    pink(tmp_path / "in" / "a.tiff")
    (tmp_path / "in" / "m.csv").write_text("slide,case_id\n" + rows)
    result = run("embed", "--manifest", tmp_path / "in" / "m.csv", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in said(result)
    assert not (tmp_path / "out").exists()


def refused(tmp_path: Path, model: Path, genes: pd.DataFrame | None) -> str:
    """Embed one slide with a model that must refuse; return the message."""
    words: list[object] = ["embed", pink(tmp_path / "P1.tiff"), "--out", tmp_path / "out"]
    words += ["--model", model]
    if genes is not None:
        genes.to_csv(tmp_path / "genes.csv", index_label="case_id")
        words += ["--genes", tmp_path / "genes.csv"]
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "out").exists()  # refused before the first slide is opened
    return said(result)


def test_features_of_another_width(tmp_path: Path, trained: Path) -> None:
    model = small_run(trained.parent / "narrow", width=384)
    assert "must have width 384" in refused(tmp_path, model, None)


def test_options_are_compared_with_the_model(tmp_path: Path, trained: Path) -> None:
    table([[1.0, 2.0, 3.0]], GENES).to_csv(tmp_path / "genes.csv", index_label="case_id")
    words = ["embed", pink(tmp_path / "P1.tiff"), "--out", tmp_path / "out", "--model", trained]
    words += ["--genes", tmp_path / "genes.csv", "--no-overlays"]
    for option, other in (("--mpp", "1.0"), ("--tile-px", "224"), ("--tile-encoder", "gigapath")):
        result = run(*words, option, other)
        assert result.exit_code == 1
        assert f"{option} must be" in said(result)
        assert "as the model" in said(result)
    assert not (tmp_path / "out").exists()
    spelled = DEFAULT_ENCODER.upper().replace("-", "_")
    assert run(*words, "--mpp", "0.5", "--tile-encoder", spelled).exit_code == 0


def table(values: Iterable[Iterable[float]], names: Iterable[str]) -> pd.DataFrame:
    return pd.DataFrame([list(row) for row in values], ["P1"], list(names))


def test_genes_with_gaps_and_unknown_genes(tmp_path: Path, trained: Path) -> None:
    gap = table([[1.0, np.nan, 2.0]], GENES)
    message = refused(tmp_path / "gap", trained, gap)
    assert "NaN" in message
    assert "P1" in message
    unknown = table([[1.0, 2.0, 3.0]], ("A1BG", "A2M", "NAT1"))
    message = refused(tmp_path / "unknown", trained, unknown)
    assert "3 missing" in message
    assert "EGFR" in message


def test_tables_of_other_cases(tmp_path: Path, trained: Path) -> None:
    other = table([[1.0, 2.0, 3.0]], GENES).set_axis(["TCGA-1"])
    message = refused(tmp_path / "other", trained, other)
    assert "--genes must have rows of the slides' cases (P1), got TCGA-1" in message
    assert "case_id" in message
    pd.DataFrame({"case_id": ["P1"], "age": [50]}).to_csv(tmp_path / "clinic.csv", index=False)
    words = ["embed", pink(tmp_path / "P1.tiff"), "--out", tmp_path / "out", "--model", trained]
    result = run(*words, "--clinical", tmp_path / "clinic.csv")
    assert result.exit_code == 1
    assert "tuned without them" in said(result)


def test_a_case_without_its_failed_slide_says_so(tmp_path: Path, trained: Path) -> None:
    pink(tmp_path / "good.tiff")
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    (tmp_path / "m.csv").write_text("slide,case_id\ngood.tiff,P1\nbad.svs,P1\ngood2.tiff,P2\n")
    pink(tmp_path / "good2.tiff")
    table([[1.0, 2.0, 3.0]], GENES).to_csv(tmp_path / "genes.csv", index_label="case_id")
    words = ["embed", "--manifest", tmp_path / "m.csv", "--out", tmp_path / "out"]
    words += ["--model", trained, "--genes", tmp_path / "genes.csv", "--no-overlays"]
    result = run(*words)
    assert result.exit_code == 1
    assert "case P1 is embedded without slide bad, which failed" in said(result)
    assert "1 of 2 cases have no row in --genes: P2" in said(result)
    assert "1 cases embedded from slide + genes" in said(result)
    assert "1 cases embedded from slide the slide encoder of this model is random" in said(result)


def test_broken_runs(tmp_path: Path, trained: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold run.json" in refused(tmp_path / "a", empty, None)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    weights = bytearray((trained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    (damaged / "run.json").write_bytes((trained / "run.json").read_bytes())
    assert "checksum" in refused(tmp_path / "b", damaged, None)


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    result = run("import-checkpoint", tmp_path / "other.safetensors", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "published ModalTune state_dict" in said(result)
    assert "patch_embed.proj.weight" in said(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.shared
def test_golden_and_import_export(tmp_path: Path, shared_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = "case1_sum_avg_train"
    for suffix in (".json", ".safetensors"):
        source = shared_dir / "golden" / f"{case}{suffix}"
        (tmp_path / "golden").mkdir(exist_ok=True)
        (tmp_path / "golden" / source.name).write_bytes(source.read_bytes())
    result = run("golden", tmp_path / "golden", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["missed"] == 0
    assert "0 missed" in run("golden", tmp_path / "golden").output

    stored = load_file(tmp_path / "golden" / f"{case}.safetensors")
    weights = {k.removeprefix("weights/"): t for k, t in stored.items() if k.startswith("weights/")}
    save_file(weights, tmp_path / "state.safetensors")
    options = json.loads((tmp_path / "golden" / f"{case}.json").read_text())
    kept = {k: options[k] for k in ("interaction_indexes", "num_heads", "slide_ngrids", "longnet")}
    (tmp_path / "options.json").write_text(json.dumps(kept))
    result = run(
        "import-checkpoint", tmp_path / "state.safetensors", "--out", tmp_path / "run",
        "--config", tmp_path / "options.json", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["position_convention"] == "reference"
    back = tmp_path / "back.safetensors"
    result = run("import-checkpoint", tmp_path / "run", "--to-published", "--out", back)
    assert result.exit_code == 0, result.output
    again = load_file(back)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_golden_without_cases(tmp_path: Path) -> None:
    result = run("golden", tmp_path)
    assert result.exit_code == 1
    assert "must hold golden cases" in said(result)


def test_doctor_as_json() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    names = {check["name"] for check in json.loads(result.stdout)["checks"]}
    assert {"torch", "efficientnet-lite0"} <= names
