"""What a slide's metadata say is judged, and what is no whole slide is refused by name."""

from __future__ import annotations

import json
import logging
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile

from modaltune.engine.errors import InputError, MissingMppError, SlideError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide, slide_info

Rgb = npt.NDArray[np.uint8]
SVS = "data/slides/CMU-1-Small-Region.svs"
READERS = ("cucim", "openslide", "image")


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Smooth coloured noise without white, so that shifts and padding show."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.asarray(cv2.normalize(blurred, None, 0, 240, cv2.NORM_MINMAX), dtype=np.uint8)


def decoded_level0(path: Path) -> Rgb:
    """Decode level 0 with tifffile and imagecodecs, independently of the readers."""
    return np.asarray(tifffile.imread(path, key=0))


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three-level pyramids, tiled unless named otherwise."""
    folder = tmp_path_factory.mktemp("pyramids")
    paths = {}
    for name in ("deflate", "jpeg", "lzw", "jpeg2000", "none-stripped", "jpeg-stripped"):
        codec, _, kind = name.partition("-")
        name = name if kind else f"{codec}-tiled"
        paths[name] = write_pyramid(
            folder / f"{name}.tif",
            picture(320, 448),
            mpp=0.5,
            levels=3,
            tile_px=None if kind else 128,
            compression=codec,  # type: ignore[arg-type]
        )
    return paths


@pytest.fixture
def tiled(pyramids: dict[str, Path]) -> Path:
    return pyramids["jpeg-tiled"]


def tiff_with(path: Path, resolution: tuple[float, float], unit: str) -> Path:
    rgb = picture(64, 64)
    tifffile.imwrite(
        path, rgb, tile=(32, 32), photometric="rgb", resolution=resolution, resolutionunit=unit
    )
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [((20_000, 20_000), "CENTIMETER", 0.5), ((101_600, 101_600), "INCH", 0.25)],
)
def test_mpp_comes_from_resolution_tags(
    tmp_path: Path, reader: str, resolution: tuple[float, float], unit: str, mpp: float
) -> None:
    with open_slide(tiff_with(tmp_path / "a.tif", resolution, unit), reader=reader) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-6)
        assert slide.mpp_source == "metadata"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("resolution", "unit", "problem"),
    [
        ((20_000, 20_000), "NONE", "none in its metadata"),
        ((72, 72), "INCH", "none in its metadata"),
        ((96, 96), "INCH", "none in its metadata"),
        ((28, 28), "CENTIMETER", "none in its metadata"),
        ((300, 300), "INCH", r"84\.6667 x 84\.6667 from its metadata"),
        ((1_000_000, 1_000_000), "CENTIMETER", r"0\.01 x 0\.01 from its metadata"),
        ((20_000, 18_000), "CENTIMETER", r"0\.5 along x and 0\.555556 along y"),
    ],
)
def test_a_useless_resolution_is_an_error_that_names_the_options(
    tmp_path: Path, reader: str, resolution: tuple[float, float], unit: str, problem: str
) -> None:
    path = tiff_with(tmp_path / "a.tif", resolution, unit)
    with open_slide(path, reader=reader) as slide:
        assert slide.mpp_source is None
        with pytest.raises(MissingMppError, match=problem) as caught:
            _ = slide.mpp
    for part in (str(path), "0.05..5", "--base-mpp", "manifest's column mpp"):
        assert part in str(caught.value)
    with open_slide(path, reader=reader, base_mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "option")


def test_a_slightly_oblong_pixel_is_averaged(tmp_path: Path) -> None:
    path = tiff_with(tmp_path / "a.tif", (20_000, 19_800), "CENTIMETER")
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5 + 10_000 / 19_800) / 2)


@pytest.mark.parametrize(("dpi", "mpp"), [(50_800, 0.5), (96, None), (None, None)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_images_state_dots_per_inch(
    tmp_path: Path, suffix: str, dpi: int | None, mpp: float | None
) -> None:
    options = {} if dpi is None else {"dpi": (dpi, dpi)}
    PIL.Image.fromarray(picture(32, 32)).save(tmp_path / f"a.{suffix}", **options)
    info = slide_info(tmp_path / f"a.{suffix}")
    assert info["mpp"] == (None if mpp is None else pytest.approx(mpp, rel=1e-3))


@pytest.mark.parametrize("base_mpp", [0, -0.5, 1e6, 5.01, 0.049, math.nan, math.inf])
def test_base_mpp_is_checked(tiled: Path, base_mpp: float) -> None:
    with pytest.raises(InputError, match=r"base_mpp must lie in 0\.05\.\.5 .* got .*; a 40x scan"):
        open_slide(tiled, base_mpp=base_mpp)


@pytest.mark.parametrize(("base_mpp", "is_warned"), [(0.5, False), (0.51, False), (0.25, True)])
def test_base_mpp_against_metadata(
    tiled: Path, base_mpp: float, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with open_slide(tiled, base_mpp=base_mpp) as slide:
        assert slide.mpp == base_mpp
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(warnings) == is_warned
    if is_warned:
        assert "base_mpp 0.25 given, but the metadata say 0.5" in warnings[0]


@pytest.mark.shared
@pytest.mark.parametrize(("share", "needed"), [(0.1, 1275952), (0.5, 1275952), (0.99, 1938214)])
@pytest.mark.parametrize("reader", [None, *READERS])
def test_a_truncated_slide_is_refused(
    shared_dir: Path, tmp_path: Path, share: float, needed: int, reader: str | None
) -> None:
    whole = (shared_dir / SVS).read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SlideError) as caught:
        open_slide(path, reader=reader)
    size = int(len(whole) * share)
    assert f"slide must be whole, got {path} truncated: {size} bytes" in str(caught.value)
    assert f"tags point to {needed}; copy or download it again" in str(caught.value)


@pytest.mark.parametrize("bytes_missing", [1, 100, 30_000])
@pytest.mark.parametrize("kind", ["deflate-tiled", "none-stripped", "jpeg-tiled"])
def test_a_pyramid_that_lacks_its_end_is_refused(
    pyramids: dict[str, Path], tmp_path: Path, kind: str, bytes_missing: int
) -> None:
    path = tmp_path / "cut.tif"
    path.write_bytes(pyramids[kind].read_bytes()[:-bytes_missing])
    with pytest.raises(SlideError, match=r"must be whole, got .*cut\.tif truncated"):
        open_slide(path)


@pytest.mark.parametrize("cut", [4, 6, 8, 12, 100])
def test_a_header_without_body_is_refused(tiled: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.tif"
    path.write_bytes(tiled.read_bytes()[:cut])
    with pytest.raises(SlideError, match="truncated"):
        open_slide(path)


def _make_text(path: Path) -> None:
    path.write_text("this is no slide\n" * 50)


def _make_noise(path: Path) -> None:
    path.write_bytes(b"II*\0" + np.random.default_rng(0).bytes(4000))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.svs", Path.touch, r"must not be empty, got .*a\.svs with 0 bytes; copy it again"),
        (
            "a.svs",
            _make_text,
            r"readable by cucim or openslide or image, got .* no readable PNG",
        ),
        ("a.svs", _make_noise, r"slide must be .*a\.svs"),
        ("a.svs", Path.mkdir, r"must be a file, got the folder .*a\.svs; name the files"),
        ("a.svs", lambda path: None, r"must be an existing file, got .*a\.svs; check the path"),
        ("a\0.svs", lambda path: None, "must be a path without NUL"),
    ],
)
def test_what_is_no_slide_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(SlideError, match=message):
        open_slide(tmp_path / name)


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    PIL.Image.fromarray(picture(200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideError, match=r"region of .*cut\.png must be readable"):
        open_slide(tmp_path / "cut.png")


def test_an_unknown_reader_is_refused(tiled: Path) -> None:
    with pytest.raises(InputError, match="reader must be one of cucim, openslide, image, got 'x'"):
        open_slide(tiled, reader="x")


def test_a_forced_reader_that_fails_is_named(pyramids: dict[str, Path]) -> None:
    with pytest.raises(SlideError, match=r"readable by cucim, got .*strips are read as RGBA"):
        open_slide(pyramids["jpeg-stripped"], reader="cucim")


def damaged(source: Path, target: Path, tile: int) -> Path:
    """Zero one level-0 tile of a copy, as a download with holes does."""
    content = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tif:
        page = tif.pages[0]
        start, count = page.dataoffsets[tile], page.databytecounts[tile]
    content[start : start + count] = bytes(count)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("codec", ["deflate", "jpeg", "lzw", "jpeg2000"])
def test_a_damaged_tile_costs_itself_and_never_reads_as_pixels(
    pyramids: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    # 4 x 3 tiles of 128 px; tile 5 is (128, 128), in the middle.
    path = damaged(pyramids[f"{codec}-tiled"], tmp_path / "hole.tif", 5)
    rgb = decoded_level0(pyramids[f"{codec}-tiled"])
    locations = [(0, 0), (256, 0), (300, 128), (130, 130), (0, 256)]
    with open_slide(path) as slide:
        assert slide.name == "cucim"
        for _ in range(2):
            with pytest.raises(SlideError, match=r"got level 0 \(130, 130\) 60 x 60 px: "):
                slide.read_region((130, 130), (60, 60))
        regions = slide.read_regions(locations, (60, 60), num_workers=2)
        for x, y in locations[:3]:
            np.testing.assert_array_equal(next(regions), rgb[y : y + 60, x : x + 60])
        with pytest.raises(SlideError, match=r"got level 0 \(130, 130\) 60 x 60 px: "):
            next(regions)
        np.testing.assert_array_equal(slide.read_region((0, 256), (60, 60)), rgb[256:316, :60])


@pytest.mark.parametrize("reader", ["openslide", "image"])
def test_other_readers_go_on_after_a_damaged_tile(
    pyramids: dict[str, Path], tmp_path: Path, reader: str
) -> None:
    path = damaged(pyramids["jpeg-tiled"], tmp_path / "hole.tif", 5)
    rgb = decoded_level0(pyramids["jpeg-tiled"])
    with open_slide(path, reader=reader) as slide:
        with pytest.raises(SlideError, match=r"got level 0 \(130, 130\) 60 x 60 px: "):
            slide.read_region((130, 130), (60, 60))
        np.testing.assert_array_equal(slide.read_region((0, 0), (60, 60)), rgb[:60, :60])


def png_header(path: Path, width: int, height: int) -> Path:
    """Write a PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_a_declared_size_over_budget_is_refused_undecoded(tmp_path: Path) -> None:
    small = png_header(tmp_path / "a.png", 12_000, 10_000)
    with pytest.raises(SlideError, match="must have at most 1000000 pixels, got 12000 x 10000"):
        open_slide(small, pixel_budget=10**6)
    with pytest.raises(SlideError, match=r"plain image .*b\.png must fit Pillow's budget"):
        open_slide(png_header(tmp_path / "b.png", 2_000_000_000, 2_000_000_000))


def test_huge_file_tiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(64, 64), tile=(2048, 2048), photometric="rgb")
    with pytest.raises(SlideError, match=r"file tiles of .* at most 1000000 pixels, got 2048 x 2"):
        open_slide(path, pixel_budget=10**6)


@pytest.mark.parametrize("reader", READERS)
def test_reads_are_checked_before_they_allocate(tiled: Path, reader: str) -> None:
    with open_slide(tiled, reader=reader) as slide:
        with pytest.raises(SlideError, match=r"must be 1\.\.268435456 pixels, got 100000 x 100000"):
            slide.read_region((0, 0), (100_000, 100_000))
        with pytest.raises(SlideError, match="size of a region"):
            slide.read_regions([(0, 0)], (0, 5))
        with pytest.raises(SlideError, match=r"level of .* must be 0\.\.2, got 3"):
            slide.read_region((0, 0), (8, 8), 3)
        with pytest.raises(SlideError, match=r"locations must be integers \[n, 2\], got float64"):
            slide.read_regions(np.zeros((3, 2)), (8, 8))  # type: ignore[arg-type]
        with pytest.raises(SlideError, match="num_workers must be >= 1, got 0"):
            slide.read_regions([(0, 0)], (8, 8), num_workers=0)
        with pytest.raises(SlideError, match=r"max_side must be 1\.\.16384, got 100000"):
            slide.thumbnail(100_000)


@pytest.mark.shared
def test_info_is_json(shared_dir: Path) -> None:
    info = slide_info(shared_dir / SVS)
    assert json.loads(json.dumps(info)) == info
    assert info["library"].startswith("cuCIM ")
    expected = {
        "reader": "cucim",
        "device": "cpu",
        "vendor": "aperio",
        "dimensions": [2220, 2967],
        "levels": [{"width": 2220, "height": 2967, "downsample": 1.0}],
        "mpp": 0.499,
        "mpp_source": "metadata",
        "mpp_problem": None,
        "compression": "JPEG",
        "tile_px": [240, 240],
        "bytes": 1938955,
        "associated_images": ["label", "macro", "thumbnail"],
    }
    assert {key: info[key] for key in expected} == expected


def test_libraries_print_nothing(pyramids: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh process: cuCIM prints at its first import too, past Python's streams."""
    paths = [str(pyramids[key]) for key in ("deflate-tiled", "jpeg-stripped", "jpeg2000-tiled")]
    code = f"""
from modaltune.engine.readers import open_slide
for path in {paths!r}:
    with open_slide(path) as slide:
        list(slide.read_regions([(0, 0), (5, 5)], (8, 8)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_libraries_print_is_logged(
    pyramids: dict[str, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="modaltune")
    open_slide(pyramids["deflate-tiled"], reader="cucim").close()
    assert "AdobeDeflate compression support is not configured" in caplog.text
    assert capfd.readouterr() == ("", "")
