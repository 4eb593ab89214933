"""Readers agree with each other and with independent decoders, and refuse what they can't read."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile

from modaltune.engine.errors import SlideError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide

Rgb = npt.NDArray[np.uint8]
SVS = "data/slides/CMU-1-Small-Region.svs"
FIELD = "data/slides/TCGA-HT-7470-01Z-00-DX4_roi_20x.png"
READERS = ("cucim", "openslide", "image")
TILED = ("deflate", "jpeg", "lzw", "jpeg2000", "none")


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Smooth coloured noise without white, so that shifts and padding show."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.asarray(cv2.normalize(blurred, None, 0, 240, cv2.NORM_MINMAX), dtype=np.uint8)


def padded(rgb: Rgb, x: int, y: int, width: int, height: int) -> Rgb:
    """Cut a region out of an array, white outside it: the oracle of every read."""
    out = np.full((height, width, 3), 255, np.uint8)
    for row in range(max(y, 0), min(y + height, rgb.shape[0])):
        left, right = max(x, 0), min(x + width, rgb.shape[1])
        if right > left:
            out[row - y, left - x : right - x] = rgb[row, left:right]
    return out


def decoded_levels(path: Path) -> list[Rgb]:
    """Decode every page with tifffile and imagecodecs, independently of the readers."""
    with tifffile.TiffFile(path) as tif:
        return [page.asarray() for page in tif.pages]


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three-level pyramids of every codec, tiled and stripped; sides are multiples of 4."""
    folder = tmp_path_factory.mktemp("pyramids")
    paths = {}
    for codec in TILED:
        for kind, tile_px in (("tiled", 128), ("stripped", None)):
            paths[f"{codec}-{kind}"] = write_pyramid(
                folder / f"{codec}-{kind}.tif",
                picture(320, 448),
                mpp=0.5,
                levels=3,
                tile_px=tile_px,
                compression=codec,  # type: ignore[arg-type]
            )
    return paths


@pytest.fixture
def tiled(pyramids: dict[str, Path]) -> Path:
    return pyramids["jpeg-tiled"]


@pytest.mark.shared
@pytest.mark.parametrize("reader", READERS)
def test_the_shared_slide_reads_as_tifffile_decodes_it(shared_dir: Path, reader: str) -> None:
    whole = decoded_levels(shared_dir / SVS)[0]
    with open_slide(shared_dir / SVS, reader=reader) as slide:
        assert slide.name == reader
        assert slide.dimensions == (2220, 2967)
        assert slide.mpp == pytest.approx(0.499)
        assert slide.mpp_source == "metadata"
        np.testing.assert_array_equal(slide.read_region((0, 0), slide.dimensions), whole)
        for x, y in [(0, 0), (239, 241), (-100, 50), (2100, 2900), (-7, -9), (5000, 0), (9, -999)]:
            region = slide.read_region((x, y), (300, 200))
            np.testing.assert_array_equal(region, padded(whole, x, y, 300, 200))


@pytest.mark.shared
def test_cucim_is_first_choice_for_the_shared_slide(
    shared_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="modaltune")
    with open_slide(shared_dir / SVS) as slide:
        assert slide.name == "cucim"
    assert "read by cuCIM" in caplog.text
    assert "on the CPU (aperio" in caplog.text


@pytest.mark.parametrize("kind", ["tiled", "stripped"])
@pytest.mark.parametrize("codec", TILED)
def test_every_codec_and_level_reads_as_tifffile_decodes_it(
    pyramids: dict[str, Path], codec: str, kind: str
) -> None:
    path = pyramids[f"{codec}-{kind}"]
    levels = decoded_levels(path)
    with open_slide(path) as slide:
        assert slide.name == ("cucim" if kind == "tiled" else "image")
        assert [(v.width, v.height, v.downsample) for v in slide.levels] == [
            (448, 320, 1.0),
            (224, 160, 2.0),
            (112, 80, 4.0),
        ]
        for level, rgb in enumerate(levels):
            for x, y in [(0, 0), (17, 33), (60, 40), (-12, -20), (100, 70), (900, 900)]:
                step = 2**level
                region = slide.read_region((x * step, y * step), (51, 35), level)
                np.testing.assert_array_equal(region, padded(rgb, x, y, 51, 35))
    if codec != "jpeg":
        np.testing.assert_array_equal(levels[0], picture(320, 448))


@pytest.mark.parametrize("codec", ["deflate", "jpeg", "lzw", "none"])
def test_readers_agree_at_every_level(pyramids: dict[str, Path], codec: str) -> None:
    path = pyramids[f"{codec}-tiled"]
    slides = [open_slide(path, reader=reader) for reader in READERS]
    for level in range(3):
        for location in [(0, 0), (101, 57), (-64, 300), (444, -8)]:
            first, *others = [slide.read_region(location, (60, 50), level) for slide in slides]
            for other in others:
                np.testing.assert_array_equal(first, other)
    for slide in slides:
        slide.close()


@pytest.mark.parametrize("reader", READERS)
def test_odd_sides_keep_their_place(tmp_path: Path, reader: str) -> None:
    path = write_pyramid(tmp_path / "odd.tif", picture(401, 1003), mpp=0.5, levels=3, tile_px=128)
    levels = decoded_levels(path)
    with open_slide(path, reader=reader) as slide:
        for level, rgb in enumerate(levels):
            scale = slide.levels[level].downsample
            for x, y in [(0, 0), (33, 11), (201, 60)]:
                region = slide.read_region((round(x * scale), round(y * scale)), (40, 30), level)
                if reader != "openslide" or level == 0:
                    np.testing.assert_array_equal(region, rgb[y : y + 30, x : x + 40])
                    continue
                # OpenSlide interpolates here: each value stays among those of its neighbours.
                around = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
                near = np.ones((3, 3), np.uint8)
                low = cv2.erode(around, near)[1:-1, 1:-1][y : y + 30, x : x + 40].astype(int)
                high = cv2.dilate(around, near)[1:-1, 1:-1][y : y + 30, x : x + 40].astype(int)
                assert (region >= low - 1)[1:-1, 1:-1].all()
                assert (region <= high + 1)[1:-1, 1:-1].all()


@pytest.mark.parametrize(
    ("codec", "reader"),
    [("jpeg2000", "image"), ("webp", "image"), ("zstd", "openslide")],
)
def test_codecs_that_cucim_fails_on_go_to_the_next_reader(
    tmp_path: Path, codec: str, reader: str
) -> None:
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, picture(200, 300), compression=codec, **options)
    with open_slide(path) as slide:
        assert slide.name == reader
        region = slide.read_region((90, 100), (150, 150))
    np.testing.assert_array_equal(region, padded(tifffile.imread(path), 90, 100, 150, 150))


def test_deflate_with_a_predictor_is_kept_from_cucim_which_crashes_on_it(tmp_path: Path) -> None:
    rgb = picture(200, 300)
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, rgb, compression="adobe_deflate", predictor=True, **options)
    with open_slide(path) as slide:
        assert slide.name == "openslide"
        np.testing.assert_array_equal(slide.read_region((0, 0), (300, 200)), rgb)
    with pytest.raises(SlideError, match="cucim: level page 0: Deflate with a predictor crashes"):
        open_slide(path, reader="cucim")


@pytest.mark.parametrize("colour", ["YCBC", "RGB"])
def test_aperio_jpeg2000_reads_alike(tmp_path: Path, colour: str) -> None:
    rgb = picture(256, 384)
    stored = rgb
    if colour == "YCBC":
        stored = np.ascontiguousarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
    path = tmp_path / "a.svs"
    tifffile.imwrite(
        path,
        stored,
        tile=(128, 128),
        photometric="rgb",
        metadata=None,
        compression=f"aperio_jp2000_{colour.lower()}",
        compressionargs={"level": 0, "reversible": True, "mct": colour == "RGB"},
        description="Aperio Image Library v1\r\nJ2K|AppMag = 40|MPP = 0.2520",
    )
    for reader in ("cucim", "openslide"):
        with open_slide(path, reader=reader) as slide:
            assert slide.mpp == pytest.approx(0.252)
            region = slide.read_region((50, 60), (200, 150)).astype(int)
        # Eight-bit YCbCr and back is off by rounding.
        limit = 2 if colour == "YCBC" else 0
        assert np.abs(region - rgb[60:210, 50:250]).max() <= limit


def test_subifd_levels_are_seen(tmp_path: Path) -> None:
    rgb = picture(256, 384)
    half = cv2.resize(rgb, (192, 128), interpolation=cv2.INTER_AREA)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
        writer.write(rgb, subifds=1, **options)
        writer.write(half, subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.name == "image"
        assert [(v.width, v.height) for v in slide.levels] == [(384, 256), (192, 128)]
        np.testing.assert_array_equal(slide.read_region((0, 0), (192, 128), 1), half)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("tile", [(128, 128), None])
def test_grey_tiffs_become_rgb(tmp_path: Path, photometric: str, tile: Any) -> None:
    grey = picture(200, 300)[..., 0]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, grey, tile=tile, photometric=photometric, compression="deflate")
    with open_slide(path) as slide:
        region = slide.read_region((0, 0), (300, 200))
    expected = grey if photometric == "minisblack" else 255 - grey
    np.testing.assert_array_equal(region, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_plain_images_read_as_pillow_does(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(picture(150, 200)).save(path)
    expected = np.asarray(PIL.Image.open(path).convert("RGB"))
    with open_slide(path, base_mpp=0.5) as slide:
        assert slide.name == "image"
        np.testing.assert_array_equal(slide.read_region((0, 0), (200, 150)), expected)
        region = slide.read_region((150, -10), (100, 90))
    np.testing.assert_array_equal(region, padded(expected, 150, -10, 100, 90))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(64, 64), np.zeros((64, 64), np.uint8)])
    rgba[32:, :, 3] = 255
    PIL.Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        region = slide.read_region((0, 0), (64, 64))
    assert (region[:32] == 255).all()
    np.testing.assert_array_equal(region[32:], rgba[32:, :, :3])


@pytest.mark.shared
def test_the_shared_field_opens(shared_dir: Path) -> None:
    with open_slide(shared_dir / FIELD, base_mpp=0.5) as slide:
        assert (slide.name, slide.dimensions, slide.mpp_source) == ("image", (1024, 1024), "option")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("count", [0, 1, 2, 17, 70])
def test_batches_equal_single_reads_and_share_no_memory(
    tiled: Path, reader: str, count: int
) -> None:
    rng = np.random.default_rng(count)
    locations = rng.integers(-40, 440, (count, 2))
    with open_slide(tiled, reader=reader) as slide:
        kept = list(slide.read_regions(locations, (32, 24), 1, num_workers=2))
        assert len(kept) == count
        for location, region in zip(locations, kept, strict=True):
            single = slide.read_region((int(location[0]), int(location[1])), (32, 24), 1)
            np.testing.assert_array_equal(region, single)
    before = [region.copy() for region in kept]
    for index, region in enumerate(kept):
        region[:] = 0
        if index + 1 < count:
            np.testing.assert_array_equal(kept[index + 1], before[index + 1])


@pytest.mark.parametrize("codec", TILED)
def test_batches_of_every_codec_are_right(pyramids: dict[str, Path], codec: str) -> None:
    path = pyramids[f"{codec}-tiled"]
    rgb = decoded_levels(path)[0]
    locations = [(x, y) for y in range(0, 320, 80) for x in range(0, 448, 112)]
    with open_slide(path) as slide:
        for (x, y), region in zip(locations, slide.read_regions(locations, (90, 70)), strict=True):
            np.testing.assert_array_equal(region, padded(rgb, x, y, 90, 70))


@pytest.mark.parametrize("reader", READERS)
def test_an_abandoned_iterator_does_no_harm(tiled: Path, reader: str) -> None:
    locations = np.zeros((600, 2), dtype=np.int64)
    with open_slide(tiled, reader=reader) as slide:
        first = slide.read_region((0, 0), (16, 16))
        for _ in range(3):
            regions = slide.read_regions(locations, (16, 16), num_workers=2)
            np.testing.assert_array_equal(next(regions), first)
            del regions
        np.testing.assert_array_equal(slide.read_region((0, 0), (16, 16)), first)


@pytest.mark.parametrize("reader", READERS)
def test_threads_may_share_a_reader(tiled: Path, reader: str) -> None:
    rgb = decoded_levels(tiled)[0]
    places = [(int(x), int(y)) for x, y in np.random.default_rng(0).integers(0, 250, (80, 2))]
    with open_slide(tiled, reader=reader) as slide, ThreadPoolExecutor(4) as pool:
        regions = pool.map(lambda place: slide.read_region(place, (64, 64)), places)
        for (x, y), region in zip(places, regions, strict=True):
            np.testing.assert_array_equal(region, rgb[y : y + 64, x : x + 64])


@pytest.mark.parametrize("reader", READERS)
def test_a_pickled_reader_opens_the_file_again(tiled: Path, reader: str) -> None:
    with open_slide(tiled, reader=reader, base_mpp=0.5) as slide:
        copy = pickle.loads(pickle.dumps(slide))
        first = slide.read_region((9, 9), (50, 50))
    assert (copy.name, copy.mpp_source) == (reader, "option")
    np.testing.assert_array_equal(copy.read_region((9, 9), (50, 50)), first)
    copy.close()


def test_a_forked_child_opens_the_file_again(tiled: Path) -> None:
    with open_slide(tiled, reader="openslide") as slide:
        parents = slide.backend
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def child() -> None:
            same = slide.read_region((9, 9), (50, 50))
            queue.put((slide.backend is parents, same))

        process = context.Process(target=child)
        process.start()
        is_shared, region = queue.get(timeout=20)
        process.join(20)
        assert not is_shared
        np.testing.assert_array_equal(region, slide.read_region((9, 9), (50, 50)))


def test_a_closed_reader_says_so(tiled: Path) -> None:
    slide = open_slide(tiled)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="must be open to be read"):
        slide.read_region((0, 0), (8, 8))


@pytest.mark.parametrize(("max_side", "level"), [(448, 0), (300, 0), (200, 1), (112, 2), (37, 2)])
def test_thumbnails_are_averaged_from_the_nearest_larger_level(
    pyramids: dict[str, Path], max_side: int, level: int
) -> None:
    path = pyramids["deflate-tiled"]
    with open_slide(path) as slide:
        thumbnail, downsample = slide.thumbnail(max_side)
    assert max(thumbnail.shape[:2]) == max_side
    assert downsample == pytest.approx(448 / max_side)
    size = max_side, round(320 * max_side / 448)
    expected = cv2.resize(decoded_levels(path)[level], size, interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(thumbnail, expected)


def test_a_small_slide_keeps_its_size(pyramids: dict[str, Path]) -> None:
    with open_slide(pyramids["deflate-tiled"]) as slide:
        thumbnail, downsample = slide.thumbnail(5000)
    assert thumbnail.shape == (320, 448, 3)
    assert downsample == 1.0


def test_a_slide_over_budget_is_averaged_in_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modaltune.engine._reader_base._BAND_PX", 20_000)
    rgb = picture(431, 643)
    path = write_pyramid(tmp_path / "a.tif", rgb, mpp=0.5, tile_px=64)
    with open_slide(path, pixel_budget=64 * 643) as slide:
        thumbnail, downsample = slide.thumbnail(64)
    assert downsample == pytest.approx(643 / 64)
    expected = cv2.resize(rgb, (64, 43), interpolation=cv2.INTER_AREA).astype(int)
    assert thumbnail.shape == expected.shape
    assert np.abs(thumbnail.astype(int) - expected).max() <= 1  # rounded twice
