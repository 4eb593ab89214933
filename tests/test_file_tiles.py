"""File tiles past the reader: its pixels, found damage, and half-scale JPEG close to averages."""

from __future__ import annotations

import dataclasses
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

from modaltune.engine._slide_tags import read_tiff_tags
from modaltune.engine.decode_read import ReadShape, read_group
from modaltune.engine.errors import SlideError
from modaltune.engine.file_tiles import FileTiles, can_decode, open_file_tiles
from modaltune.engine.pyramid import Compression, write_pyramid
from modaltune.engine.readers import SlideReader, open_slide

Rgb = npt.NDArray[np.uint8]
SVS = "data/slides/CMU-1-Small-Region.svs"
# Mean absolute difference on H&E that the module promises.
PROMISED = 1.5


def smooth(height: int, width: int) -> Rgb:
    """Coloured blobs, the three channels unlike."""
    noise = np.random.default_rng(3).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def averaged(rgb: Rgb) -> Rgb:
    half = rgb.shape[1] // 2, rgb.shape[0] // 2
    return np.asarray(cv2.resize(rgb, half, interpolation=cv2.INTER_AREA))


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


def stitched(tiles: FileTiles, x: int, y: int, size: tuple[int, int], factor: int = 1) -> Rgb:
    """A box of whole file tiles, each read by itself."""
    width, height = tiles.tile_px
    read = tiles.read_half if factor == 2 else tiles.read
    rows = [
        np.concatenate([read(left, top).copy() for left in range(x, x + size[0], width)], axis=1)
        for top in range(y, y + size[1], height)
    ]
    return np.concatenate(rows)[: -(-size[1] // factor), : -(-size[0] // factor)]


def overwrite(path: Path, index: int, data: bytes, at: int = 0) -> None:
    """Write bytes over those of a file tile of level 0."""
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[index]
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(data)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_the_pixels_are_the_readers(tmp_path: Path, codec: Compression, level: int) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(700, 901), mpp=0.25, levels=2, tile_px=128, compression=codec
    )
    with opened(path, level) as (slide, tiles):
        size = slide.levels[level].width, slide.levels[level].height
        expected = slide.read_at(0, 0, size, level)
        np.testing.assert_array_equal(stitched(tiles, 0, 0, size), expected)
        assert tiles.corner(len(tiles) - 1) == tuple((side - 1) // 128 * 128 for side in size)


@pytest.mark.shared
def test_an_aperio_slide(shared_dir: Path) -> None:
    """Its JPEG holds RGB without saying so in the stream, and its tables once for all tiles."""
    with opened(shared_dir / SVS) as (slide, tiles):
        width, height = tiles.tile_px
        size = 3 * width, 3 * height
        expected = slide.read_at(3 * width, 3 * height, size, 0)
        np.testing.assert_array_equal(stitched(tiles, 3 * width, 3 * height, size), expected)


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_memory_that_is_given_is_used_where_it_fits(tmp_path: Path, codec: Compression) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression=codec
    )
    with opened(path) as (slide, tiles):
        block = np.zeros((3, 128, 128, 3), dtype=np.uint8)
        assert tiles.read(128, 0, block[1]).base is block
        np.testing.assert_array_equal(block[1], slide.read_at(128, 0, (128, 128), 0))
        assert not block[[0, 2]].any()
        other = np.zeros((64, 128, 3), dtype=np.uint8)
        assert tiles.read(0, 0, other) is not other
        assert not other.any()


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
    with FileTiles(path, read_tiff_tags(path).levels[0]) as tiles:
        for read in (tiles.read, tiles.read_half):
            read(0, 0)
            with pytest.raises(SlideError, match=r"file tile 1 of .* must decode to 128 x 128 px"):
                read(128, 0)


def test_padding_before_the_end_is_no_damage(tmp_path: Path) -> None:
    whole = encoded(smooth(128, 128))
    streams = [whole] + [whole[:-2] + bytes(n) + whole[-2:] for n in range(1, 40)]
    path = write_jpegs(tmp_path / "a.tif", streams, len(streams), (128 * len(streams), 128))
    with FileTiles(path, read_tiff_tags(path).levels[0]) as tiles:
        expected = tiles.read(0, 0).copy()
        for index in range(1, len(streams)):
            np.testing.assert_array_equal(tiles.read(128 * index, 0), expected)


def test_a_progressive_jpeg_is_read_whole_and_a_cut_one_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(smooth(128, 128)).save(buffer, "jpeg", progressive=True)
    whole = buffer.getvalue()
    path = write_jpegs(tmp_path / "a.tif", [whole, whole[: -len(whole) // 4]], 2, (256, 128))
    with FileTiles(path, read_tiff_tags(path).levels[0]) as tiles:
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
    tifffile.imwrite(path, smooth(64, 64), photometric="rgb", metadata=None, extratags=[tag])
    assert read_tiff_tags(path).levels[0].jpeg_tables == b""


def test_other_pixels_than_the_readers_are_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with open_slide(path) as slide:
        page = slide.pages[0]
        others = {"offsets": page.offsets[::-1], "byte_counts": page.byte_counts[::-1]}
        monkeypatch.setattr(slide.backend, "pages", (dataclasses.replace(page, **others),))
        assert can_decode(slide.pages[0])
        assert open_file_tiles(slide, 0) is None


def test_a_damaged_tile_in_the_middle_does_not_decide(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(384, 384), mpp=0.25, tile_px=128, compression="jpeg"
    )
    overwrite(path, 4, bytes(64))
    with opened(path) as (slide, tiles):
        np.testing.assert_array_equal(tiles.read(0, 0), slide.read_at(0, 0, (128, 128), 0))


@pytest.mark.shared
@pytest.mark.parametrize("tile_px", [256, 512])
def test_half_scale_keeps_its_promise_on_tissue(
    shared_dir: Path, tmp_path: Path, tile_px: int
) -> None:
    with open_slide(shared_dir / SVS) as slide:
        rgb = slide.read_region((0, 0), (2048, 2048))
    path = write_pyramid(
        tmp_path / "a.tif", rgb, mpp=0.25, tile_px=tile_px, compression="jpeg", quality=80
    )
    with opened(path) as (slide, tiles):
        full = slide.read_region((0, 0), (2048, 2048))
        found = mean_difference(stitched(tiles, 0, 0, (2048, 2048), 2), averaged(full))
    assert 0 < found < PROMISED


@pytest.mark.shared
def test_half_scale_of_an_aperio_slide(shared_dir: Path) -> None:
    with opened(shared_dir / SVS) as (slide, tiles):
        width, height = tiles.tile_px
        full = slide.read_region((4 * width, 4 * height), (2 * width, 2 * height))
        found = stitched(tiles, 4 * width, 4 * height, (2 * width, 2 * height), 2)
    assert mean_difference(found, averaged(full)) < 3  # quality 30: more is lost than at 80


def test_colours_and_places_at_half_scale(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(300, 401), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with opened(path) as (slide, tiles):
        assert tiles.can_halve
        for box in ((0, 0, 256, 256), (128, 128, 128, 128), (256, 256, 145, 44)):
            x, y, width, height = box
            full = slide.read_region((x, y), (width, height))
            found = stitched(tiles, x, y, (width, height), 2)
            assert found.shape == (-(-height // 2), -(-width // 2), 3)
            even = found[: height // 2, : width // 2]
            assert mean_difference(even, averaged(full[: height // 2 * 2, : width // 2 * 2])) < 1


def test_groups_use_it_where_edges_are_even_and_else_decode_in_full(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(512, 512), mpp=0.25, tile_px=128, compression="jpeg"
    )
    shape = ReadShape(0, 128, 64)
    with opened(path) as (slide, tiles):
        for offset, is_halved in ((0, True), (100, True), (101, False)):
            coords = np.array([[offset, offset], [offset + 128, offset]])
            full = np.zeros((2, 64, 64, 3), dtype=np.uint8)
            found = np.zeros_like(full)
            assert not read_group(slide, coords, shape, full).any()
            assert not read_group(slide, coords, shape, found, tiles, is_half_scale=True).any()
            assert (mean_difference(found, full) > 0) == is_halved
            assert mean_difference(found, full) < 1


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


@pytest.mark.parametrize(
    ("compression", "tile_px", "is_ours"),
    [("jpeg", 128, True), ("deflate", 128, True), ("lzw", 128, False), ("jpeg", 32, False)],
)
def test_which_files_are_read_so(
    tmp_path: Path, compression: Compression, tile_px: int, is_ours: bool
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.5, tile_px=tile_px, compression=compression
    )
    with open_slide(path) as slide:
        assert slide.name == "cucim"
        found = open_file_tiles(slide, 0)
    assert (found is not None) == is_ours
    if found is not None:
        assert found.can_halve == (compression == "jpeg")
        found.close()


@pytest.mark.parametrize("reader", ["openslide", "image"])
def test_other_readers_keep_their_slides(tmp_path: Path, reader: str) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with open_slide(path, reader=reader) as slide:
        assert open_file_tiles(slide, 0) is None
