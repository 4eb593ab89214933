"""Plain images as slides: TIFF through tifffile, segment by segment; PNG and JPEG through Pillow.

A TIFF that tifffile can't decode (imagecodecs has no such codec, or its colours need converting) is
decoded whole by Pillow, as PNG and JPEG are.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL
import PIL.Image
import tifffile

from modaltune.engine._quiet import quiet_libraries
from modaltune.engine._reader_base import WHITE, ReaderName, Rgb
from modaltune.engine._reader_openslide import over_white
from modaltune.engine._slide_tags import DECODER_ERRORS, PageTags, TiffTags
from modaltune.engine.errors import SlideError

_CACHE_BYTES = 2**27
_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6
_JPEG, _APERIO_JP2000_YCBCR = 7, 33003
_ALPHA = ("UNASSALPHA",)
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_MICRONS_PER_INCH = 25_400.0


class _Source(Protocol):
    """Where the pixels of a plain image come from."""

    library: str
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    tile_sizes: tuple[tuple[int, int] | None, ...]

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region inside the level, uint8 [h, w, 3]."""
        ...

    def mpp(self) -> tuple[float, float] | None:
        """Microns per pixel, where the image says more than TIFF tags do."""
        ...

    def close(self) -> None:
        """Free the file."""
        ...


class ImageBackend:
    """A PNG, JPEG or TIFF file read as a slide."""

    name: ReaderName = "image"

    def __init__(self, path: Path, tags: TiffTags | None, pixel_budget: int) -> None:
        self._path = path
        self._source = _open_source(path, tags, pixel_budget)
        self.library, self.vendor = self._source.library, self._source.vendor
        self.level_sizes = self._source.level_sizes
        self.tile_sizes: tuple[tuple[int, int] | None, ...] = self._source.tile_sizes
        self.pages: tuple[PageTags, ...] = ()

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region that lies inside the level, uint8 [h, w, 3]."""
        try:
            return self._source.read(x, y, size, level)
        except DECODER_ERRORS as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(
                f"region of {self._path} must be readable, got level {level} ({x}, {y}) "
                f"{size[0]} x {size[1]} px: {error}; copy the image again or leave the region out"
            ) from error

    def read_many(
        self, corners: npt.NDArray[np.int64], size: tuple[int, int], level: int, num_workers: int
    ) -> Generator[Rgb, None, None]:
        """Read regions at corners [n, 2] in order; `num_workers` is not used."""
        for x, y in corners:
            yield self.read(int(x), int(y), size, level)

    def metadata_mpp(self) -> tuple[float, float] | None:
        """Microns per pixel from PNG's pHYs or JPEG's JFIF density."""
        return self._source.mpp()

    def associated_images(self) -> tuple[str, ...]:
        """Return nothing: plain images have none."""
        return ()

    def close(self) -> None:
        """Free the file and the decoded pixels."""
        self._source.close()


def _open_source(path: Path, tags: TiffTags | None, pixel_budget: int) -> _Source:
    """Choose tifffile or Pillow for a file."""
    if tags is None:
        return _PillowSource(path, None, pixel_budget)
    reason = _tifffile_refusal(tags)
    if reason is None:
        source = _TiffSource(path, tags, pixel_budget)
        try:
            source.read(0, 0, (1, 1), 0)
        except DECODER_ERRORS as error:
            source.close()
            if isinstance(error, SlideError):
                raise
            reason = str(error)
        else:
            return source
    try:
        return _PillowSource(path, tags, pixel_budget)
    except SlideError as error:
        raise SlideError(f"{error} (tifffile: {reason})") from error


def _tifffile_refusal(tags: TiffTags) -> str | None:
    """Say why the segments of a TIFF can't be used as they are decoded."""
    for page in tags.levels:
        if not page.is_gapless:
            return "its number of tiles or strips does not fit its size"
        if page.bits != 8 or page.is_planar:
            return "not 8 bits per sample, interleaved"
        is_jpeg = page.photometric == _YCBCR and page.compression == _JPEG
        if page.photometric not in (_MINISWHITE, _MINISBLACK, _RGB) and not is_jpeg:
            return f"colour space {page.photometric} is not converted"
        if page.compression == _APERIO_JP2000_YCBCR:
            return "JPEG 2000 in YCbCr is not converted"
        if page.samples not in ((3, 4) if page.photometric in (_RGB, _YCBCR) else (1,)):
            return f"{page.samples} samples per pixel"
    return None


class _TiffSource:
    """Strips or tiles decoded one at a time by tifffile, the last ones kept."""

    vendor = "tiff"

    def __init__(self, path: Path, tags: TiffTags, pixel_budget: int) -> None:
        for page in tags.levels:
            if math.prod(page.segment_px) > pixel_budget:
                raise SlideError(
                    f"tiles and strips of {path} must have at most {pixel_budget} pixels, got "
                    f"{page.segment_px[0]} x {page.segment_px[1]}; write it as a tiled TIFF"
                )
        self._levels = tags.levels
        with quiet_libraries(path.name):
            self._tif = tifffile.TiffFile(path)
            first: Any = self._tif.pages[0]
            self._pages: list[Any] = [
                (first.pages if page.is_sub else self._tif.pages)[page.index]
                for page in tags.levels
            ]
        self.library = f"tifffile {tifffile.__version__}"
        self.level_sizes = tuple((page.width, page.height) for page in tags.levels)
        self.tile_sizes = tuple(p.segment_px if p.is_tiled else None for p in tags.levels)
        self._cache: OrderedDict[tuple[int, int], Rgb] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Assemble a region from the segments under it."""
        page = self._levels[level]
        width, height = page.segment_px
        columns = -(-page.width // width)
        rgb = np.full((size[1], size[0], 3), WHITE, dtype=np.uint8)
        for row in range(y // height, (y + size[1] - 1) // height + 1):
            for column in range(x // width, (x + size[0] - 1) // width + 1):
                segment = self._segment(level, row * columns + column)
                left, top = column * width, row * height
                x0, y0 = max(x, left), max(y, top)
                x1 = min(x + size[0], left + segment.shape[1])
                y1 = min(y + size[1], top + segment.shape[0])
                rgb[y0 - y : y1 - y, x0 - x : x1 - x] = segment[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return rgb

    def _segment(self, level: int, index: int) -> Rgb:
        """Decode a tile or strip, or take it from the cache."""
        key = level, index
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        page = self._levels[level]
        offset, count = int(page.offsets[index]), int(page.byte_counts[index])
        if count == 0:  # a sparse file: nothing was scanned here
            return np.full((*page.segment_px[::-1], 3), WHITE, dtype=np.uint8)
        segment = _as_rgb(self._decode(level, index, offset, count), page, self._pages[level])
        with self._lock:
            self._cache[key] = segment
            self._cached_bytes += segment.nbytes
            while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return segment

    def _decode(self, level: int, index: int, offset: int, count: int) -> Any:
        """Read and decode one segment, [h, w, samples]."""
        page, handle = self._pages[level], self._tif.filehandle
        with self._lock:
            handle.seek(offset)
            data = handle.read(count)
        tables: dict[str, Any] = {}
        if page.compression == _JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        decoded = page.decode(data, index, **tables)[0]
        if decoded is None:
            raise ValueError(f"segment {index} holds nothing")
        return decoded[0]

    def mpp(self) -> tuple[float, float] | None:
        """Nothing beyond the TIFF tags."""
        return None

    def close(self) -> None:
        """Free the file and the cache."""
        self._tif.close()
        self._cache.clear()


def _as_rgb(segment: npt.NDArray[np.uint8], page: PageTags, tiff_page: Any) -> Rgb:
    """Turn a decoded segment [h, w, 1 | 3 | 4] into uint8 [h, w, 3]."""
    if page.photometric == _MINISWHITE:
        segment = 255 - segment
    if page.samples == 1:
        return np.repeat(segment[..., :1], 3, axis=2)
    if page.samples == 4 and [e.name for e in tiff_page.extrasamples] == list(_ALPHA):
        return over_white(segment)
    return np.ascontiguousarray(segment[..., :3])


class _PillowSource:
    """Whole levels decoded by Pillow at first use, one kept."""

    def __init__(self, path: Path, tags: TiffTags | None, pixel_budget: int) -> None:
        self._path = path
        self._budget = pixel_budget
        # Pillow does not reach levels in SubIFDs.
        pages = [page for page in tags.levels if not page.is_sub] if tags else []
        self._frames = [page.index for page in pages] or [0]
        self._lock = threading.Lock()
        self._decoded: tuple[int, Rgb] | None = None
        with self._open() as image:
            self.vendor = (image.format or "image").lower()
            self._dpi = image.info.get("dpi")
            self.level_sizes: tuple[tuple[int, int], ...] = (image.size,)
        if pages:
            self.level_sizes = tuple((page.width, page.height) for page in pages)
        for size in self.level_sizes:
            self._check_budget(size)
        self.tile_sizes: tuple[tuple[int, int] | None, ...] = (None,) * len(self.level_sizes)
        self.library = f"Pillow {PIL.__version__}"

    def _open(self) -> PIL.Image.Image:
        """Read the header; pixels are not decoded before they are asked for."""
        try:
            with quiet_libraries(self._path.name), warnings.catch_warnings():
                # Our own budget is checked; Pillow's raises at twice the size it warns at.
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                warnings.simplefilter("ignore", UserWarning)
                image = PIL.Image.open(self._path, formats=("PNG", "JPEG", "TIFF"))
        except PIL.UnidentifiedImageError as error:
            raise SlideError(f"{self._path} is no readable PNG, JPEG or TIFF image") from error
        except PIL.Image.DecompressionBombError as error:
            raise SlideError(
                f"plain image {self._path} must fit Pillow's budget, got: {error}; write it as a "
                "tiled TIFF"
            ) from error
        except DECODER_ERRORS as error:
            raise SlideError(f"{self._path} has a damaged header: {error}") from error
        if image.mode not in _MODES:
            image.close()
            raise SlideError(
                f"plain image {self._path} must have 8 bits per sample, got mode {image.mode}; "
                "convert it to 8-bit RGB"
            )
        return image

    def _check_budget(self, size: tuple[int, int]) -> None:
        """Refuse a declared size before anything is allocated."""
        if math.prod(size) > self._budget:
            raise SlideError(
                f"plain image {self._path} must have at most {self._budget} pixels, got "
                f"{size[0]} x {size[1]}; write it as a tiled TIFF or raise pixel_budget"
            )

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Cut a region out of the decoded level."""
        with self._lock:
            if self._decoded is None or self._decoded[0] != level:
                self._decoded = level, self._decode(level)
            rgb = self._decoded[1]
        return rgb[y : y + size[1], x : x + size[0]].copy()

    def _decode(self, level: int) -> Rgb:
        """Decode a level, alpha laid on white."""
        with self._open() as image, quiet_libraries(self._path.name):
            if self._frames[level]:
                image.seek(self._frames[level])
            if image.size != self.level_sizes[level]:
                raise ValueError(f"size {image.size}, declared {self.level_sizes[level]}")
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                return over_white(np.asarray(image.convert("RGBA")))
            return np.array(image.convert("RGB"))

    def mpp(self) -> tuple[float, float] | None:
        """Microns per pixel from dots per inch."""
        if self.vendor == "tiff" or self._dpi is None:
            return None
        x, y = (float(v) for v in self._dpi)
        return (_MICRONS_PER_INCH / x, _MICRONS_PER_INCH / y) if x > 0 and y > 0 else None

    def close(self) -> None:
        """Free the decoded pixels."""
        self._decoded = None
