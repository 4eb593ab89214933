"""File tiles that are damaged, cut, foreign or out of reach: noticed, and only they are lost."""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import simplejpeg
import tifffile

from modaltune.engine.decode_read import ReadShape, read_group
from modaltune.engine.errors import SlideError
from modaltune.engine.file_tiles import FileTiles, open_file_tiles
from modaltune.engine.pyramid import Compression, write_pyramid
from modaltune.engine.readers import SlideReader, open_slide

Rgb = npt.NDArray[np.uint8]


def smooth(height: int, width: int) -> Rgb:
    """Coloured blobs, the three channels unlike."""
    noise = np.random.default_rng(3).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def mean_difference(a: Rgb, b: Rgb) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@contextmanager
def opened(path: Path, level: int = 0) -> Iterator[tuple[SlideReader, FileTiles]]:
    """A slide, and the file tiles of a level of it."""
    with open_slide(path, base_mpp=0.25) as slide:
        tiles = open_file_tiles(slide, level)
        assert tiles is not None
        with tiles:
            yield slide, tiles


def overwrite(path: Path, index: int, data: bytes, at: int = 0) -> None:
    """Write bytes over those of a file tile of level 0."""
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[index]
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(data)


@contextmanager
def unasked(path: Path) -> Iterator[FileTiles]:
    """The file tiles of level 0, whatever the slide's reader thinks of them."""
    with open_slide(path, base_mpp=0.5) as slide, FileTiles(path, slide.pages[0]) as tiles:
        yield tiles


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_damage_in_the_middle_of_a_tile_is_noticed(tmp_path: Path, codec: Compression) -> None:
    """Its first and last bytes are right; cuCIM returns such a JPEG without an error."""
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 512), mpp=0.25, tile_px=128, compression=codec
    )
    with tifffile.TiffFile(path) as tif:
        count = tif.pages[0].databytecounts[1]
    overwrite(path, 1, bytes(300), at=count - 400)
    with opened(path) as (slide, tiles):
        with pytest.raises(SlideError, match=r"file tile 1 of .*a\.tif must decode to 128 x 128"):
            tiles.read(128, 0)
        out = np.zeros((2, 128, 128, 3), dtype=np.uint8)
        bad = read_group(slide, np.array([[0, 0], [100, 0]]), ReadShape(0, 128, 128), out, tiles)
        np.testing.assert_array_equal(bad, [False, True])
        np.testing.assert_array_equal(out[0], slide.read_at(0, 0, (128, 128), 0))
        assert (out[1] == 255).all()


def test_most_random_damage_of_a_jpeg_is_noticed(tmp_path: Path) -> None:
    """Bytes changed anywhere behind the tables; the rest decodes to pixels that might be right."""
    path = write_pyramid(
        tmp_path / "a.tif", smooth(384, 384), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[4], tif.pages[0].databytecounts[4]
    whole = path.read_bytes()[offset : offset + count]
    rng, noticed, trials = np.random.default_rng(0), 0, 200
    with opened(path) as (_, tiles):
        for _ in range(trials):
            length = int(rng.choice([1, 4, 64, 512]))
            place = int(rng.integers(700, count - length))
            overwrite(path, 4, rng.bytes(length), at=place)
            try:
                tiles.read(128, 128)
            except SlideError:
                noticed += 1
            overwrite(path, 4, whole)
        tiles.read(128, 128)
    assert noticed > trials / 2


def test_a_jpeg_without_an_end_is_read_if_all_of_it_is_there(tmp_path: Path) -> None:
    rgb = smooth(256, 256)
    paths = [
        write_pyramid(tmp_path / name, rgb, mpp=0.25, tile_px=128, compression="jpeg")
        for name in ("whole.tif", "endless.tif", "cut.tif")
    ]
    with tifffile.TiffFile(paths[0]) as tif:
        page = tif.pages[0]
        count = page.databytecounts[3]
        tag = page.tags["TileByteCounts"]
        place = tag.valueoffset + 3 * (tag.valuebytecount // 4)
        word = tag.valuebytecount // 4
    for path, lost in ((paths[1], 2), (paths[2], 60)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write((count - lost).to_bytes(word, "little"))
    with opened(paths[0]) as (_, whole), opened(paths[1]) as (_, endless):
        np.testing.assert_array_equal(endless.read(128, 128), whole.read(128, 128))
    with opened(paths[2]) as (_, cut), pytest.raises(SlideError, match=r"file tile 3 .* got "):
        cut.read(128, 128)


def test_short_deflate_is_damage(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128)
    overwrite(path, 2, zlib.compress(bytes(1000)))
    with opened(path) as (_, tiles), pytest.raises(SlideError, match="got 1000 bytes of 49152"):
        tiles.read(0, 128)


def write_jpegs(path: Path, streams: list[bytes], columns: int, size: tuple[int, int]) -> Path:
    """Write JPEG streams as the tiles of 128 px of a slide."""
    assert len(streams) == columns * -(-size[1] // 128)
    tifffile.imwrite(
        path, iter(streams), shape=(size[1], size[0], 3), dtype=np.uint8, tile=(128, 128),
        compression="jpeg", photometric="ycbcr", subsampling=(2, 2), metadata=None,
    )  # fmt: skip
    return path


def encoded(rgb: Rgb) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), 90, "RGB", "420"))


def test_tiles_cut_at_the_edge_are_left_to_the_reader(tmp_path: Path) -> None:
    """Some writers store in the last row only what lies inside."""
    rgb = smooth(228, 256)
    pieces = [rgb[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128)]
    path = write_jpegs(tmp_path / "a.tif", [encoded(piece) for piece in pieces], 2, (256, 228))
    with open_slide(path, base_mpp=0.5) as slide:
        assert mean_difference(slide.read_region((0, 0), (256, 228)), rgb) < 3
        assert open_file_tiles(slide, 0) is None


@pytest.mark.parametrize("kind", ["large", "small", "grey", "cmyk"])
def test_a_jpeg_of_another_size_or_colour_is_no_tile(tmp_path: Path, kind: str) -> None:
    whole = encoded(smooth(128, 128))
    buffer = io.BytesIO()
    if kind in ("large", "small"):
        side = 256 if kind == "large" else 112
        other = encoded(smooth(side, side))
    else:
        mode = "L" if kind == "grey" else "CMYK"
        PIL.Image.fromarray(smooth(128, 128)).convert(mode).save(buffer, "jpeg")
        other = buffer.getvalue()
    path = write_jpegs(tmp_path / "a.tif", [whole, other, whole, whole], 2, (256, 256))
    with unasked(path) as tiles:
        for read in (tiles.read, tiles.read_half):
            read(0, 0)
            with pytest.raises(SlideError, match=r"file tile 1 of .* must decode to 128 x 128 px"):
                read(128, 0)


def test_padding_before_the_end_is_no_damage(tmp_path: Path) -> None:
    whole = encoded(smooth(128, 128))
    streams = [whole] + [whole[:-2] + bytes(n) + whole[-2:] for n in range(1, 40)]
    path = write_jpegs(tmp_path / "a.tif", streams, len(streams), (128 * len(streams), 128))
    with unasked(path) as tiles:
        expected = tiles.read(0, 0).copy()
        for index in range(1, len(streams)):
            np.testing.assert_array_equal(tiles.read(128 * index, 0), expected)


def test_a_progressive_jpeg_is_read_whole_and_a_cut_one_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(smooth(128, 128)).save(buffer, "jpeg", progressive=True)
    whole = buffer.getvalue()
    path = write_jpegs(tmp_path / "a.tif", [whole, whole[: -len(whole) // 4]], 2, (256, 128))
    with unasked(path) as tiles:
        assert mean_difference(tiles.read(0, 0), smooth(128, 128)) < 5
        with pytest.raises(SlideError, match="Premature end"):
            tiles.read(128, 0)


def test_bytes_that_the_disk_does_not_give_cost_the_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128)
    with opened(path) as (slide, tiles):

        def unreadable(*_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pread", unreadable)
        out = np.zeros((1, 128, 128, 3), dtype=np.uint8)
        assert read_group(slide, np.array([[0, 0]]), ReadShape(0, 128, 128), out, tiles).all()


def test_a_surprise_while_they_are_opened_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128)
    with open_slide(path) as slide:

        def surprise(*_: object) -> Rgb:
            raise MemoryError

        monkeypatch.setattr(slide, "read_at", surprise)
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(MemoryError):
            open_file_tiles(slide, 0)
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("value", [200_000_000, (300, 400)])
def test_a_tag_of_tables_that_holds_numbers_is_passed_over(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.tif"
    count = len(value) if isinstance(value, tuple) else 1
    tag = (347, "I", count, value, True)
    tifffile.imwrite(
        path, smooth(64, 64), photometric="rgb", metadata=None, extratags=[tag], tile=(64, 64)
    )
    with open_slide(path, base_mpp=0.5) as slide:
        assert slide.pages[0].jpeg_tables == b""
        np.testing.assert_array_equal(slide.read_region((0, 0), (64, 64)), smooth(64, 64))


def test_a_damaged_tile_in_the_middle_does_not_decide(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(384, 384), mpp=0.25, tile_px=128, compression="jpeg"
    )
    overwrite(path, 4, bytes(64))
    with opened(path) as (slide, tiles):
        np.testing.assert_array_equal(tiles.read(0, 0), slide.read_at(0, 0, (128, 128), 0))


def test_a_damaged_tile_raises_and_a_group_reads_around_it(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    overwrite(path, 3, bytes(64))
    with opened(path) as (slide, tiles):
        with pytest.raises(SlideError, match=r"file tile 3 of .* got no start of a JPEG"):
            tiles.read_half(128, 128)
        out = np.zeros((4, 64, 64, 3), dtype=np.uint8)
        coords = np.array([[0, 0], [128, 0], [0, 128], [128, 128]])
        shape = ReadShape(0, 128, 64)
        bad = read_group(slide, coords, shape, out, tiles, is_half_scale=True)
    np.testing.assert_array_equal(bad, [False, False, False, True])
