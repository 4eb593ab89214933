"""Slides to feature files, with a small real encoder on slides written here."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from modaltune.engine.cohort import SlideItem, items_from_paths
from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import RecipeChangedError
from modaltune.engine.folder import EmbedOptions, embed_slides, features_folder
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.store import read_features


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    return load_encoder()


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """2 x 3 tiles of pink noise with a white column on the right."""
    rng = np.random.default_rng(0)
    rgb = np.full((512, 1024, 3), 255, dtype=np.uint8)
    rgb[:, :768] = rng.integers(120, 200, (512, 768, 3), dtype=np.uint8)
    rgb[:, :768, 1] //= 2
    path = tmp_path / "slides" / "pink.tiff"
    path.parent.mkdir()
    write_pyramid(path, rgb, mpp=0.5)
    return path


OPTIONS = EmbedOptions(min_foreground=0.9)


def test_features_are_those_of_the_tiles_alone(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    seen: list[int] = []
    report = embed_slides(
        items_from_paths([slide]),
        encoder,
        tmp_path / "out",
        OPTIONS,
        on_tiles=seen.append,
    )
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.tiles, outcome.reader) == ("done", 6, "cucim")
    stored = read_features(outcome.features or "")
    want = [[x, y] for y in (0, 256) for x in (0, 256, 512)]
    assert stored.coords.tolist() == want
    import tifffile

    pixels = tifffile.imread(slide, key=0)
    tiles = np.stack([pixels[y : y + 256, x : x + 256] for x, y in want])
    alone = torch.cat([encoder.encode(tile[None]) for tile in tiles]).numpy()
    np.testing.assert_allclose(stored.features, alone, rtol=1e-4, atol=1e-4)
    assert seen[-1] == 6
    assert (tmp_path / "out" / "overlays" / "pink.png").is_file()
    assert all(
        report.stages_s[stage] > 0 for stage in ("open", "mask", "decode", "encode", "write")
    )
    assert 0 < report.encoder_busy <= 1


def test_a_finished_slide_is_kept_and_a_different_recipe_refused(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    items, out = items_from_paths([slide]), tmp_path / "out"
    first = embed_slides(items, encoder, out, OPTIONS).outcomes[0]
    assert first.features is not None
    before = first.features.read_bytes()
    again = embed_slides(items, encoder, out, OPTIONS).outcomes[0]
    assert (again.status, again.tiles, again.features) == ("kept", 6, first.features)
    other = EmbedOptions(min_foreground=0.5)
    with pytest.raises(RecipeChangedError, match=r"min_foreground: stored 0.9, asked 0.5;.*--out"):
        embed_slides(items, encoder, out, other)
    other_mpp = [SlideItem(slide, "pink", "pink", base_mpp=0.49)]
    with pytest.raises(
        RecipeChangedError, match=r"base_mpp_given of pink: stored \(not set\), ask"
    ):
        embed_slides(other_mpp, encoder, out, OPTIONS)
    assert first.features.read_bytes() == before
    made = embed_slides(items, encoder, out, other, new_recipe=True).outcomes[0]
    assert made.status == "done"
    assert read_features(first.features).recipe["min_foreground"] == 0.5


def test_without_a_ledger_another_slide_of_the_name_does_not_get_its_features(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    items, out = items_from_paths([slide]), tmp_path / "out"
    path = embed_slides(items, encoder, out, OPTIONS).outcomes[0].features
    assert path is not None
    (out / "ledger.sqlite").unlink()
    assert embed_slides(items, encoder, out, OPTIONS).outcomes[0].status == "kept"
    (out / "ledger.sqlite").unlink()
    had = slide.stat().st_size
    write_pyramid(slide, np.full((512, 768, 3), 150, dtype=np.uint8), mpp=0.5)
    now = slide.stat().st_size
    with pytest.raises(
        RecipeChangedError,
        match=rf"slide pink: stored {had} bytes, asked {now} bytes;.*--new-recipe",
    ):
        embed_slides(items, encoder, out, OPTIONS)
    assert len(read_features(path).features) == 6
    made = embed_slides(items, encoder, out, OPTIONS, new_recipe=True).outcomes[0]
    assert (made.status, made.tiles) == ("done", 6)


def test_a_damaged_file_is_made_again(slide: Path, encoder: TileEncoder, tmp_path: Path) -> None:
    items, out = items_from_paths([slide]), tmp_path / "out"
    path = embed_slides(items, encoder, out, OPTIONS).outcomes[0].features
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert embed_slides(items, encoder, out, OPTIONS).outcomes[0].status == "done"
    with h5py.File(path) as file:
        assert file["features"].shape == (6, 1280)


def test_a_bad_slide_costs_itself_only(slide: Path, encoder: TileEncoder, tmp_path: Path) -> None:
    bad = tmp_path / "slides" / "bad.svs"
    bad.write_text("not a slide")
    blank = tmp_path / "slides" / "blank.tiff"
    write_pyramid(blank, np.full((600, 600, 3), 255, np.uint8), mpp=0.5)
    unknown = tmp_path / "slides" / "unknown.tiff"
    write_pyramid(unknown, np.full((600, 600, 3), 90, np.uint8), mpp=None)
    items = items_from_paths([bad, blank, unknown, slide])
    told: list[str] = []
    report = embed_slides(
        items,
        encoder,
        tmp_path / "out",
        OPTIONS,
        on_slide=lambda outcome: told.append(outcome.slide_id),
    )
    assert [o.status for o in report.outcomes] == ["quarantined", "empty", "quarantined", "done"]
    assert sorted(told) == ["bad", "blank", "pink", "unknown"]
    assert "bad.svs" in report.outcomes[0].reason
    assert "no tissue" in report.outcomes[1].reason
    assert "--base-mpp" in report.outcomes[2].reason
    assert [o.slide_id for o in report.lost] == ["bad", "unknown"]
    folder = features_folder(tmp_path / "out", encoder)
    assert sorted(p.name for p in folder.iterdir()) == ["blank.h5", "pink.h5"]
    empty = read_features(folder / "blank.h5")
    assert empty.features.shape == (0, 1280)
    assert empty.empty_reason
    counts = report.to_dict()["counts"]
    assert counts == {"done": 1, "empty": 1, "kept": 0, "failed": 0, "quarantined": 2}
    alone = tmp_path / "alone"
    embed_slides(items_from_paths([slide]), encoder, alone, OPTIONS)
    undisturbed = features_folder(alone, encoder) / "pink.h5"
    assert undisturbed.read_bytes() == (folder / "pink.h5").read_bytes()
    told.clear()
    later = embed_slides(items, encoder, tmp_path / "out", OPTIONS)
    assert [o.status for o in later.outcomes] == ["quarantined", "kept", "quarantined", "kept"]
    assert later.outcomes[0].reason == report.outcomes[0].reason


def test_a_slide_that_lacked_its_mpp_is_tried_again_with_it(
    encoder: TileEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "unknown.tiff"
    write_pyramid(path, np.full((600, 600, 3), 90, np.uint8), mpp=None)
    assert embed_slides(items_from_paths([path]), encoder, tmp_path, OPTIONS).lost
    report = embed_slides(items_from_paths([path], 0.5), encoder, tmp_path, OPTIONS)
    assert report.outcomes[0].status == "done"
