"""File tiles decoded straight from the slide's bytes into the memory where they are wanted.

cuCIM decodes into memory of its own, from which everything is copied once more, and returns a JPEG
damaged in its middle without an error. Here libjpeg-turbo (simplejpeg) and libdeflate (imagecodecs)
decode one file tile at a time: the pixels are the same, damage raises. For the other codecs there
is nothing to gain: JPEG 2000 decodes at one speed in all libraries.
"""

from __future__ import annotations

import logging
import os
import struct
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg

from modaltune.engine._slide_tags import PageTags
from modaltune.engine.errors import SlideError

if TYPE_CHECKING:
    from modaltune.engine.readers import SlideReader

Rgb = npt.NDArray[np.uint8]

_JPEG, _DEFLATE = 7, 8
_RGB = 2
_START, _END = b"\xff\xd8", b"\xff\xd9"
# Adobe's marker with transform 0: the three components are RGB, not YCbCr.
_IS_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
# Start of a frame: baseline, 17 bytes, 8 bits; height, width and number of components follow. It
# comes before all pixels, behind tables of less than these bytes.
_FRAME, _FRAME_WITHIN = b"\xff\xc0\x00\x11\x08", 2048
_PADDING, _PADDED = bytes(4), "extraneous bytes before marker 0xd9"
# Below this side, calling a decoder costs more than decoding: cuCIM reads many at a time.
_LEAST_PX = 64

logger = logging.getLogger(__name__)


def can_decode(page: PageTags) -> bool:
    """Whether the tiles of a page that cuCIM reads are JPEG or Deflate, and not very small."""
    return page.compression in (_JPEG, _DEFLATE) and min(page.segment_px) >= _LEAST_PX


def open_file_tiles(slide: SlideReader, level: int) -> FileTiles | None:
    """Open a level's file tiles, if they decode to the pixels of the slide's own reader.

    The tile with the most bytes is compared, which shows most, and the last, which the level's
    edges cut; one that is damaged does not count.

    Args:
        slide: The open slide.
        level: Index into its levels.

    Returns:
        The tiles, to be closed; None where the slide's reader must decode them: another codec or
        reader, decoding on a GPU, or other pixels.
    """
    if slide.device != "cpu" or not slide.pages or not can_decode(slide.pages[level]):
        return None
    page = slide.pages[level]
    tiles = FileTiles(slide.path, page)
    try:
        same = [
            _is_same(slide, level, tiles, index)
            for index in (int(page.byte_counts.argmax()), len(tiles) - 1)
        ]
    except BaseException:
        tiles.close()
        raise
    if True in same and False not in same:
        return tiles
    logger.debug("%s: level %d decodes otherwise than by its reader", slide.path, level)
    tiles.close()
    return None


def _is_same(slide: SlideReader, level: int, tiles: FileTiles, index: int) -> bool | None:
    """Whether a tile has the pixels that the slide's reader gives it; None where it is damaged."""
    x, y = tiles.corner(index)
    width, height = tiles.size_at(x, y)
    try:
        expected = slide.read_at(x, y, (width, height), level)
        return np.array_equal(tiles.read(x, y)[:height, :width], expected)
    except _FormatError as error:
        logger.debug("%s", error)
        return False
    except SlideError as error:
        logger.debug("%s", error)
        return None


class _FormatError(SlideError):
    """A file tile is no image of the tile's size and colours, damaged or not."""


class FileTiles:
    """The file tiles of one level of a TIFF; a context manager. Not for several threads.

    Attributes:
        tile_px: (width, height) of a tile.
        can_halve: Whether `read_half` works: JPEG with even sides.
    """

    def __init__(self, path: Path, page: PageTags) -> None:
        self._path, self._page = path, page
        self.tile_px = page.segment_px
        width, height = page.segment_px
        self.can_halve = page.compression == _JPEG and width % 2 == height % 2 == 0
        self._columns = -(-page.width // width)
        self._head = _head(page)
        self._frame = _FRAME + struct.pack(">HHB", height, width, 3)
        self._spares: dict[int, Rgb] = {}  # by factor, made when they are needed
        self._descriptor = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return self._page.offsets.size

    def corner(self, index: int) -> tuple[int, int]:
        """Return the corner (x, y) of a tile, px of the level."""
        row, column = divmod(index, self._columns)
        return column * self.tile_px[0], row * self.tile_px[1]

    def size_at(self, x: int, y: int) -> tuple[int, int]:
        """Return how much (width, height) of the tile at a corner lies inside the level."""
        width, height = self.tile_px
        return min(width, self._page.width - x), min(height, self._page.height - y)

    def read(self, x: int, y: int, out: Rgb | None = None) -> Rgb:
        """Decode one file tile.

        Args:
            x, y: Its corner, px of the level.
            out: uint8 [height, width, 3] of a tile, C-contiguous, to write to; another shape or
                None stands for memory that the next `read` uses again.

        Returns:
            uint8 [height, width, 3], RGB; the part outside the level, if any, is the encoder's.

        Raises:
            SlideError: It can't be decoded, or is damaged.
        """
        target = self._target(out, 1)
        data = self._bytes(x, y)
        if self._page.compression == _JPEG:
            return self._jpeg(data, target, x, y)
        try:
            flat: Any = target.reshape(-1)
            found: Any = imagecodecs.deflate_decode(data, out=flat)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(x, y, str(error)) from error
        if len(found) != target.nbytes:
            raise self._damaged(x, y, f"{len(found)} bytes of {target.nbytes}")
        return target

    def read_half(self, x: int, y: int, out: Rgb | None = None) -> Rgb:
        """Decode one JPEG tile at half scale: the decoder leaves out the finest frequencies.

        Less work than decoding and averaging. Against the 2 x 2 averages of the pixels decoded in
        full, on H&E at JPEG quality 80, the mean absolute difference is below 1.5 of 255
        (tests/test_file_tiles.py).

        Args:
            x, y: Its corner, px of the level.
            out: As in `read`, of half the sides.

        Returns:
            uint8 [height / 2, width / 2, 3], RGB.

        Raises:
            SlideError: It can't be decoded, or is damaged.
        """
        return self._jpeg(self._bytes(x, y), self._target(out, 2), x, y, factor=2)

    def _target(self, out: Rgb | None, factor: int) -> Rgb:
        """Return the memory that was given if a tile fits it, else memory of our own."""
        shape = self.tile_px[1] // factor, self.tile_px[0] // factor, 3
        if out is not None and out.shape == shape:
            return out
        if factor not in self._spares:
            self._spares[factor] = np.empty(shape, dtype=np.uint8)
        return self._spares[factor]

    def _bytes(self, x: int, y: int) -> bytes:
        """Read the compressed bytes of the tile at a corner."""
        index = self._index(x, y)
        offset, count = int(self._page.offsets[index]), int(self._page.byte_counts[index])
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise self._damaged(x, y, str(error)) from error

    def _index(self, x: int, y: int) -> int:
        return y // self.tile_px[1] * self._columns + x // self.tile_px[0]

    def _jpeg(self, data: bytes, target: Rgb, x: int, y: int, factor: int = 1) -> Rgb:
        """Decode a JPEG stream, completed by what the file keeps once for all tiles."""
        if not data.startswith(_START):
            raise self._damaged(x, y, "no start of a JPEG")
        is_baseline = self._frame in data[:_FRAME_WITHIN]
        # Some writers leave the end marker out. Where pixels are missing too, a baseline decoder
        # still says so.
        end = b"" if data.endswith(_END) or not is_baseline else _END
        stream = b"".join((self._head, memoryview(data)[len(_START) :], end))
        if not is_baseline:
            self._check_frame(stream, x, y)
        try:
            return _decode_jpeg(stream, target, factor)
        except ValueError as error:
            raise self._damaged(x, y, str(error)) from error

    def _check_frame(self, stream: bytes, x: int, y: int) -> None:
        """Refuse a JPEG of another size or of other colours."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(stream)
        except ValueError as error:
            raise self._damaged(x, y, str(error)) from error
        if (width, height) != self.tile_px or colours not in ("YCbCr", "RGB"):
            raise _FormatError(str(self._damaged(x, y, f"{colours} of {width} x {height} px")))

    def _damaged(self, x: int, y: int, reason: str) -> SlideError:
        width, height = self.tile_px
        return SlideError(
            f"file tile {self._index(x, y)} of {self._path} must decode to {width} x {height} px, "
            f"got {reason}; copy the slide again"
        )

    def close(self) -> None:
        """Free the descriptor, once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileTiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _decode_jpeg(stream: bytes, target: Rgb, factor: int) -> Rgb:
    """Decode a stream of a known size into memory of that size over a factor.

    Raises:
        ValueError: It is damaged, or of another size.
    """
    height, width = target.shape[:2]
    wanted = {"min_height": height, "min_width": width, "min_factor": factor} if factor > 1 else {}
    decode = partial(simplejpeg.decode_jpeg, stream, "RGB", buffer=target, **wanted)
    try:
        tile = decode()
    except ValueError as error:
        # Zeros before the end marker are padding, not what damage leaves.
        if not (_PADDED in str(error) and stream.endswith(_PADDING + _END)):
            raise
        tile = decode(strict=False)
    if tile.shape != target.shape:
        raise ValueError(f"an image of {tile.shape[1]} x {tile.shape[0]} px")
    return target


def _head(page: PageTags) -> bytes:
    """Return what goes before a tile's own JPEG stream: start marker, colour marker, tables."""
    head = _START + (_IS_RGB if page.photometric == _RGB else b"")
    return head + page.jpeg_tables.removeprefix(_START).removesuffix(_END)
