"""What a TIFF-like slide says about itself: levels, codec, resolution, and whether it is whole.

Only tags are read here, through tifffile; no pixel is decoded.
"""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import tifffile

from modaltune.engine._quiet import quiet_libraries
from modaltune.engine.errors import SlideError

_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
# Whatever the parsers of tifffile, imagecodecs and Pillow trip over in a damaged file, or raise for
# a missing codec. MemoryError is not among them: sizes are checked against a budget first.
DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tifffile.TiffFileError,
    zlib.error,
)
# A file with more pages than this is a stack, not a slide; the rest need not be looked at.
_MAX_PAGES = 512
# Four tables of each kind at their largest take 3 kB.
_MOST_TABLE_BYTES = 2**16
# Bytes per value of each TIFF data type.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 13: 4, 16: 8, 17: 8, 18: 8}
# Tags whose values lie elsewhere in the file and without which pixels are lost: strip and tile
# offsets and byte counts, JPEG tables.
_DATA_TAGS = (273, 279, 324, 325, 347)
_SUBIFDS_TAG = 330
_UNIT_INCH, _UNIT_CENTIMETRE = 2, 3
# Both letters mu; ImageJ writes the words.
_UNIT_MICRONS = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0}
_UNIT_MICRONS |= {"mm": 1e3, "cm": 1e4, "nm": 1e-3}
# Attributes are read one by one, not through an XML parser: the text is a stranger's.
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b([^>]*)>")
_ATTRIBUTE = re.compile(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']")
_MICRONS = {_UNIT_INCH: 25_400.0, _UNIT_CENTIMETRE: 10_000.0}


@dataclass(frozen=True)
class PageTags:
    """One page that may be a level: its geometry, codec and where its segments lie."""

    index: int
    is_sub: bool
    width: int
    height: int
    is_tiled: bool
    is_reduced: bool
    segment_px: tuple[int, int]
    compression: int
    photometric: int
    predictor: int
    samples: int
    bits: int
    is_planar: bool
    offsets: npt.NDArray[np.int64]
    byte_counts: npt.NDArray[np.int64]
    jpeg_tables: bytes

    @property
    def is_gapless(self) -> bool:
        """Whether there are as many tiles or strips as the page's size asks for."""
        width, height = self.segment_px
        if width < 1 or height < 1:
            return False
        planes = self.samples if self.is_planar else 1
        count = -(-self.width // width) * -(-self.height // height) * planes
        return self.offsets.size == self.byte_counts.size == count


@dataclass(frozen=True)
class TiffTags:
    """The tags of a TIFF-like slide; `levels` are the pages that show the whole level-0 field."""

    pages: tuple[PageTags, ...]
    levels: tuple[PageTags, ...]
    has_subifds: bool
    description: str
    resolution: tuple[float, float]
    resolution_unit: int

    @property
    def is_aperio(self) -> bool:
        """Whether the first page is described the way Aperio's scanners do."""
        return self.description.startswith("Aperio")

    @property
    def compression_name(self) -> str:
        """Level 0's compression in words, such as "JPEG"."""
        try:
            return tifffile.COMPRESSION(self.pages[0].compression).name
        except ValueError:
            return str(self.pages[0].compression)

    def aperio_mpp(self) -> float | None:
        """Microns per pixel from an Aperio description ("...|MPP = 0.4990|..."), if there."""
        if not self.is_aperio:
            return None
        for field in self.description.split("|"):
            key, _, value = field.partition("=")
            if key.strip() == "MPP":
                try:
                    return float(value)
                except ValueError:
                    return None
        return None

    def described_mpp(self) -> tuple[float, float] | None:
        """Microns per pixel along x and y from the text of OME-TIFF or ImageJ, if it says so."""
        if pixels := _OME_PIXELS.search(self.description):
            stated = dict(_ATTRIBUTE.findall(pixels[1]))
            found = [_ome_microns(stated, axis) for axis in "XY"]
            return None if None in found else (found[0] or 0.0, found[1] or 0.0)
        if self.description.startswith("ImageJ="):
            stated = dict(re.findall(r"^(\w+)=(.*)$", self.description, re.MULTILINE))
            unit = _UNIT_MICRONS.get(stated.get("unit", "").strip().replace("\\u00B5", "µ"))
            x, y = self.resolution
            return None if unit is None or not (x > 0 and y > 0) else (unit / x, unit / y)
        return None

    def resolution_mpp(self) -> tuple[float, float] | None:
        """Microns per pixel along x and y from the resolution tags, None without a unit."""
        microns = _MICRONS.get(self.resolution_unit)
        x, y = self.resolution
        if microns is None or not (x > 0 and y > 0):
            return None
        return microns / x, microns / y


def _ome_microns(stated: dict[str, str], axis: str) -> float | None:
    """Return OME's physical size along an axis in microns, its default unit."""
    unit = _UNIT_MICRONS.get(stated.get(f"PhysicalSize{axis}Unit", "µm"))
    try:
        return float(stated[f"PhysicalSize{axis}"]) * unit if unit is not None else None
    except (KeyError, ValueError):
        return None


def is_tiff(path: Path) -> bool:
    """Whether the file begins like a TIFF or BigTIFF of either byte order."""
    with path.open("rb") as file:
        return file.read(4) in _MAGIC


def read_tiff_tags(path: Path) -> TiffTags:
    """Read the tags of a TIFF-like slide and check that the file holds what they point to.

    Raises:
        SlideError: The file is truncated, or its tags can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        end = _chain_end(file, size)
    if end > size:
        raise _truncated(path, size, end)
    try:
        with quiet_libraries(path.name), tifffile.TiffFile(path) as tif:
            tags = _collect(tif)
    except DECODER_ERRORS as error:
        raise SlideError(
            f"slide must be a readable TIFF, got {path} ({error}); copy or convert it again"
        ) from error
    for page in tags.pages:
        count = min(page.offsets.size, page.byte_counts.size)
        if count:
            end = max(end, int((page.offsets[:count] + page.byte_counts[:count]).max()))
    if end > size:
        raise _truncated(path, size, end)
    return tags


def _truncated(path: Path, size: int, end: int) -> SlideError:
    """Build the error for a file that ends before its own tags say."""
    return SlideError(
        f"slide must be whole, got {path} truncated: {size} bytes, tags point to {end}; "
        "copy or download it again"
    )


def _chain_end(file: IO[bytes], size: int) -> int:
    """Return the highest byte that the chain of page headers needs.

    tifffile and libtiff drop a page whose header is cut off and go on with the rest, so the chain
    is followed here first.
    """
    magic = file.read(4)
    order = _MAGIC[magic]
    is_big = b"+" in magic
    if not is_big and size >= 2**32:
        return 0  # 64-bit offsets in a classic header: a vendor's dialect (NDPI), left to tifffile
    word, count_format, entry_bytes = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    word_bytes, count_bytes = struct.calcsize(word), struct.calcsize(count_format)
    file.seek(8 if is_big else 4)
    pointer = file.read(word_bytes)
    if len(pointer) < word_bytes:
        return 16 if is_big else 8
    (offset,) = struct.unpack(order + word, pointer)
    end, seen = 0, set[int]()
    while offset and offset not in seen and len(seen) < _MAX_PAGES:
        seen.add(offset)
        file.seek(offset)
        head = file.read(count_bytes)
        if len(head) < count_bytes:
            return max(end, offset + count_bytes)
        (entries,) = struct.unpack(order + count_format, head)
        if entries > 4096:
            break  # no page has that many tags: not a page header, tifffile will say so
        stop = offset + count_bytes + entries * entry_bytes + word_bytes
        if stop > size:
            return max(end, stop)
        table = file.read(entries * entry_bytes)
        end = max(end, stop, _values_end(table, order, is_big))
        (offset,) = struct.unpack(order + word, file.read(word_bytes))
    return end


def _values_end(table: bytes, order: str, is_big: bool) -> int:
    """Return the highest byte that the data tags of one page header point to."""
    entry = struct.Struct(order + ("HHQQ" if is_big else "HHII"))
    inline = 8 if is_big else 4
    end = 0
    for code, kind, count, value in entry.iter_unpack(table):
        total = count * _TYPE_BYTES.get(kind, 0)
        if code in _DATA_TAGS and total > inline:
            end = max(end, value + total)
        elif code == _SUBIFDS_TAG and count == 1:
            end = max(end, value + 2)
    return end


def _collect(tif: tifffile.TiffFile) -> TiffTags:
    """Gather the pages, and which of them are levels."""
    first: Any = tif.pages[0] if len(tif.pages) else None
    if first is None:
        raise ValueError("it has no page")
    pages = [
        _page_tags(tif.pages[index], index, is_sub=False)
        for index in range(min(len(tif.pages), _MAX_PAGES))
    ]
    lower = pages
    if first.subifds:
        # OME-TIFF keeps the lower levels of a page beneath it, not after it.
        if len(first.pages) != len(first.subifds):
            raise ValueError("a SubIFD is lost")
        subs = [_page_tags(page, index, is_sub=True) for index, page in enumerate(first.pages)]
        lower = pages[:1] + subs
    tag = first.tags.get("ResolutionUnit")
    return TiffTags(
        pages=(*pages, *lower[1:]) if lower is not pages else tuple(pages),
        levels=_levels(lower),
        has_subifds=lower is not pages,
        description=first.description,
        resolution=(_ratio(first, "XResolution"), _ratio(first, "YResolution")),
        # TIFF 6.0: a file with resolutions and no unit is in inches.
        resolution_unit=_UNIT_INCH if tag is None else int(tag.value),
    )


def _ratio(page: Any, name: str) -> float:
    """Read a rational tag, 0 where it is absent or its denominator is."""
    tag = page.tags.get(name)
    if tag is None:
        return 0.0
    numerator, denominator = tag.value
    return numerator / denominator if denominator else 0.0


def _page_tags(page: Any, index: int, *, is_sub: bool) -> PageTags:
    """Copy what is needed from a tifffile page."""
    if page.imagewidth < 1 or page.imagelength < 1:
        raise ValueError(f"page {index} has no size")
    segment = (
        (int(page.tilewidth), int(page.tilelength))
        if page.is_tiled
        else (page.imagewidth, min(int(page.rowsperstrip or page.imagelength), page.imagelength))
    )
    bits = page.bitspersample
    return PageTags(
        index=index,
        is_sub=is_sub,
        width=int(page.imagewidth),
        height=int(page.imagelength),
        is_tiled=page.is_tiled,
        is_reduced=bool(page.subfiletype & 1),
        segment_px=segment,
        compression=int(page.compression),
        photometric=int(page.photometric) if page.photometric is not None else -1,
        predictor=int(page.predictor),
        samples=int(page.samplesperpixel),
        bits=int(max(bits) if isinstance(bits, tuple) else bits),
        is_planar=page.planarconfig == 2 and page.samplesperpixel > 1,
        offsets=np.asarray(page.dataoffsets, dtype=np.int64),
        byte_counts=np.asarray(page.databytecounts, dtype=np.int64),
        jpeg_tables=_jpeg_tables(page),
    )


def _jpeg_tables(page: Any) -> bytes:
    """Copy what the JPEG tiles of a page share; none where the tag holds something else."""
    tables = page.jpegtables
    return tables if isinstance(tables, bytes) and len(tables) <= _MOST_TABLE_BYTES else b""


def _levels(pages: list[PageTags]) -> tuple[PageTags, ...]:
    """Pick level 0 and the smaller pages of the same layout, codec and proportions."""
    levels = [pages[0]]
    for page in pages[1:]:
        first, last = levels[0], levels[-1]
        ratio_x, ratio_y = first.width / page.width, first.height / page.height
        # One pixel of rounding per side is allowed for.
        slack = 0.005 + 1 / min(page.width, page.height)
        if (
            page.width < last.width
            and page.height <= last.height
            and page.is_tiled == first.is_tiled
            and page.samples == first.samples
            and (page.is_reduced or first.is_tiled)
            and abs(ratio_x / ratio_y - 1) <= slack
        ):
            levels.append(page)
    return tuple(levels)
