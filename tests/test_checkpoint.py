"""Run folders: to the bit and back, five lines from files to an embedding, damage refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modaltune
from modaltune import checkpoint
from modaltune.adapter import AdapterConfig
from modaltune.batch import CaseBatch
from modaltune.checkpoint import Run, load_run, save_run
from modaltune.clinical_encoder import ClinicalEncoder
from modaltune.config import ModalTuneConfig
from modaltune.engine.store import TileFeatures, feature_recipe, write_features
from modaltune.errors import CheckpointError, CohortError, FeatureFileError, InputError
from modaltune.gene_scaler import GeneScaler
from modaltune.modalities import GeneConfig, Modality
from modaltune.model import ModalTune
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.targets import TextProjector

GENES = ("A", "B", "C")
SHA = "ab" * 32


def features(width: int = 6, sha: str = SHA, mpp: float = 0.5) -> TileFeatures:
    rng = np.random.default_rng(0)
    recipe = feature_recipe(encoder="lite", encoder_sha256=sha, target_mpp=mpp, tile_px=256)
    return TileFeatures(
        "S1",
        rng.normal(size=(9, width)).astype(np.float32),
        np.stack([np.arange(9) * 512, np.arange(9) % 4 * 512], axis=1).astype(np.int64),
        tile_px=256,
        level0_tile_px=512,
        target_mpp=mpp,
        base_mpp=mpp / 2,
        encoder="lite",
        encoder_sha256=sha,
        level0_size=(9000, 9000),
        reader="image",
        recipe=recipe,
    )


def make_run(extra: dict[str, Modality] | None = None, **changes: Any) -> Run:
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.normal(2, 3, (20, 3)), columns=list(GENES))
    clinical = pd.DataFrame({"age": [40.0, 60.0], "sex": ["male", "female"], "site": ["lung"] * 2})
    index = PathwayIndex.build(PathwayTable(("p", "q"), (("C", "A"), ("B", "A"))), GENES)
    ready = Preprocessing(
        TileRecipe.of(features()), index, GeneScaler.fit(table), ClinicalEncoder.fit(clinical)
    )
    config = ModalTuneConfig(
        slide_encoder=LongNetConfig(in_features=6, width=16, depth=2, heads=4, ffn_width=16),
        adapter=AdapterConfig(heads=2, interactions=((0, 0), (1, 1))),
        genes=GeneConfig(width=8, depth=1, tokens=3),
        clinical_features=ready.clinical_values(clinical)[0].shape[1],
        out_features=10,
        **changes,
    )
    torch.manual_seed(0)
    model = ModalTune(
        config, gene_index=index.indices, gene_offsets=index.offsets, extra_modalities=extra
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return Run(model.eval(), ready, TextProjector(12, 10, seed=3), {"note": "test"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_features(tmp_path / "S1.h5", features())
    return save_run(tmp_path / "run", make_run())


def test_five_lines_embed_a_case(folder: Path) -> None:
    slide, genes = folder.parent / "S1.h5", {"A": 1.0, "B": -2.0, "C": 0.5}

    run = modaltune.load_run(folder)
    case = run.case("TCGA-01", slides=[slide], genes=genes)
    embedding = run.embed([case])

    assert embedding.shape == (1, 3, 10)
    assert embedding.dtype == torch.float32
    # Put together by hand: level-0 corners at 40x are halved, genes scaled in the order A, B, C.
    scaler = run.preprocessing.genes
    assert scaler is not None
    clipped = np.clip([1.0, -2.0, 0.5], scaler.low, scaler.high)
    row = torch.tensor((clipped - scaler.mean) / scaler.std, dtype=torch.float32)[None]
    tiles = torch.from_numpy(np.asarray(features().features))
    where = torch.from_numpy(features().coords) / 2
    with torch.no_grad():
        want = run.model(CaseBatch(tiles, where, torch.tensor([0, 9]), {"genes": row}))
    torch.testing.assert_close(embedding, want, rtol=0, atol=1e-6)


def test_a_run_comes_back_to_the_bit(folder: Path) -> None:
    before, after = make_run(), load_run(folder)
    own = after.model.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in before.model.state_dict().items())
    assert after.model.config == before.model.config
    assert not any(m.training for m in after.model.modules())
    assert after.info == {"note": "test"}
    assert after.preprocessing.to_dict() == before.preprocessing.to_dict()
    assert after.projector is not None
    assert before.projector is not None
    text = torch.randn(4, 12)
    assert torch.equal(after.projector.project(text), before.projector.project(text))
    files = {"slides": [folder.parent / "S1.h5"], "genes": dict.fromkeys(GENES, 1.0)}
    cases = [run.case("P", **files, clinical={"age": 50}) for run in (before, after)]
    assert torch.equal(before.embed(cases[:1]), after.embed(cases[1:]))
    again = save_run(folder.parent / "again", after)
    for name in ("run.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "run.json"]


def test_a_run_without_projector_and_tables_comes_back(tmp_path: Path) -> None:
    bare = replace(make_run(), projector=None, info={})
    assert load_run(save_run(tmp_path / "run", bare)).projector is None


def test_missing_parts_are_left_out_of_the_case(folder: Path) -> None:
    run = load_run(folder)
    image = run.case("P", slides=[folder.parent / "S1.h5"])
    assert dict(image.values) == {}
    unknown = run.case("P", genes=dict.fromkeys(GENES, 1.0), clinical={"age": None})
    assert set(unknown.values) == {"genes"}
    both = run.embed([image, unknown])
    assert bool(torch.isfinite(both).all())
    assert torch.equal(both[1:], run.embed([unknown]))
    assert run.embed([]).shape == (0, 3, 10)
    # Another number of rows in a product may round otherwise.
    torch.testing.assert_close(run.embed([image], tasks=[2]), both[:1, [2]])
    with pytest.raises(InputError, match="case P must have tiles, genes or another modality"):
        run.embed([run.case("P")])


@pytest.mark.parametrize(
    ("slide", "message"),
    [
        (features(width=5), "slide S1 must have width 6.*got 5.*tile encoder lite"),
        (features(sha="cd" * 32), "slide S1 must have encoder_sha256 abab.*got cdcd"),
        (features(mpp=1.0), r"slide S1 must have target_mpp 0\.5.*got 1\.0"),
    ],
)
def test_features_of_another_make_are_refused(
    folder: Path, slide: TileFeatures, message: str
) -> None:
    path = write_features(folder.parent / "other.h5", slide)
    with pytest.raises(FeatureFileError, match=message):
        load_run(folder).case("P", slides=[path])


def test_genes_that_do_not_fit_are_refused(folder: Path) -> None:
    run = load_run(folder)
    with pytest.raises(CohortError, match=r"2 missing \(B, C\)"):
        run.case("P", genes={"A": 1.0, "TP53": 2.0})
    with pytest.raises(CohortError, match=r"genes must be finite.*P"):
        run.case("P", genes={"A": 1.0, "B": float("nan"), "C": 0.0})


def test_a_file_that_is_no_feature_file_is_refused(folder: Path) -> None:
    bad = folder.parent / "bad.h5"
    bad.write_bytes(b"nothing")
    with pytest.raises(FeatureFileError, match="bad"):
        load_run(folder).case("P", slides=[bad])


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"must have the checksum.*damaged or was replaced"):
        load_run(folder)


@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_a_partial_folder_is_no_run(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"must hold run.json and model.safetensors, got a"):
        load_run(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="got no such folder"):
        load_run(folder)


def test_a_crash_on_the_way_leaves_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_run(folder, make_run())
    with pytest.raises(CheckpointError, match="must hold"):
        load_run(folder)
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "run.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    changed = change(described)
    path.write_text(json.dumps(described if changed is None else changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [1], "must describe a modaltune run"),
        (lambda d: d.update(format="other"), "must describe a modaltune run"),
        (lambda d: d.update(format_version=2), "of format 1 or older, got 'modaltune-run' 2"),
        (lambda d: d.pop("format_version") and None, "must describe a modaltune run"),
        (lambda d: d.pop("weights_sha256") and None, "got no weights_sha256"),
        (lambda d: d["config"].update(out_features=11), "must hold weights of the model it"),
        (lambda d: d["config"].update(token_agg="mean"), "must hold weights of the model it"),
        (lambda d: d["preprocessing"]["pathways"].pop("genes") and None, "must hold weights of"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(folder: Path, change: Any, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_run(folder)


def test_a_description_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "run.json").write_text('{"format": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run.json must be JSON"):
        load_run(folder)


def reshaped(state: dict[str, Tensor]) -> None:
    state["head_norm.weight"] = torch.ones(3)


def shortened(state: dict[str, Tensor]) -> None:
    del state["head_norm.weight"]


@pytest.mark.parametrize("change", [reshaped, shortened])
def test_weights_of_another_architecture_are_refused(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    rewrite(folder, lambda d: d.update(weights_sha256=checkpoint.file_sha256(path)))
    with pytest.raises(CheckpointError, match=r"(?s)must hold weights of.*head_norm\.weight"):
        load_run(folder)


class Panel(Modality):
    """A further modality: one token."""

    num_tokens = 1

    def __init__(self, values: int) -> None:
        super().__init__()
        self.embed = nn.Linear(values, 16)

    def forward(self, values: Tensor) -> Tensor:
        return self.embed(values)[:, None]


def test_further_modalities_are_saved_and_keep_their_places(tmp_path: Path) -> None:
    run = make_run({"proteins": Panel(4), "methylation": Panel(4)}, token_agg="cat")
    save_run(tmp_path / "run", run)
    # Named in another order: their positions and slots must not be swapped.
    fresh = {"methylation": Panel(4), "proteins": Panel(4)}
    back = load_run(tmp_path / "run", extra_modalities=fresh)
    assert back.model.spans == run.model.spans
    case = run.case("P", genes=dict.fromkeys(GENES, 1.0))
    values = {**case.values, "proteins": torch.ones(4), "methylation": -torch.ones(4)}
    case = replace(case, values=values)
    assert torch.equal(run.embed([case]), back.embed([case]))
    with pytest.raises(CheckpointError, match=r"must be \['proteins', 'methylation'\], got \[\]"):
        load_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="must hold weights of the model it describes"):
        load_run(tmp_path / "run", extra_modalities={**fresh, "proteins": Panel(5)})
