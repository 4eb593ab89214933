"""Open a slide with whatever reads it: cuCIM, then OpenSlide, then as a plain image.

A reader is taken only if it reads a small region of every level, so a file whose compression it
can't decode goes to the next one. Pixels of all readers are the same, outside the slide too.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from modaltune.engine import _reader_cucim
from modaltune.engine._reader_base import (
    PIXEL_BUDGET,
    Backend,
    DeviceName,
    Level,
    Mpp,
    OpenRequest,
    ReaderName,
    SlideReader,
)
from modaltune.engine._reader_image import ImageBackend
from modaltune.engine._reader_openslide import OpenSlideBackend, detect_vendor
from modaltune.engine._slide_tags import TiffTags, is_tiff, read_tiff_tags
from modaltune.engine.errors import InputError, SlideError

__all__ = ["PIXEL_BUDGET", "READERS", "Level", "SlideReader", "open_slide", "slide_info"]

logger = logging.getLogger(__name__)

READERS: tuple[ReaderName, ...] = ("cucim", "openslide", "image")
MIN_MPP, MAX_MPP = 0.05, 5.0
# Metadata that differ by more than this share along x and y, or from the user's value, are wrong.
_MPP_TOLERANCE = 0.05
# Dots per inch that software writes without having measured anything.
_PLACEHOLDER_DPI = (1.0, 72.0, 96.0)
_MICRONS_PER_INCH = 25_400.0
_PROBE_PX = 32


def open_slide(
    path: str | os.PathLike[str],
    *,
    base_mpp: float | None = None,
    reader: str | None = None,
    pixel_budget: int = PIXEL_BUDGET,
    device: DeviceName = "cpu",
) -> SlideReader:
    """Open a slide with the first reader that opens it and reads its compression.

    Args:
        path: Slide file: any layout of cuCIM or OpenSlide, or a PNG, JPEG or TIFF image.
        base_mpp: Microns per level-0 pixel, 0.05..5; overrides the metadata.
        reader: "cucim", "openslide" or "image" to allow that one only.
        pixel_budget: Most pixels of one read, one plain image and one tile of a file, checked
            before they are allocated (default 2**28, 805 MB of RGB).
        device: "cuda" has cuCIM decode on the GPU, for files that it reads; its JPEG pixels may
            differ from the CPU's by rounding.

    Returns:
        A SlideReader, a context manager. Without a usable mpp it opens all the same; reading its
        `mpp` raises MissingMppError.

    Raises:
        SlideError: The file is missing, empty, truncated, over the budget or read by no reader.
        InputError: `base_mpp`, `reader`, `pixel_budget` or `device` breaks its rule.
    """
    _check_arguments(base_mpp, reader, pixel_budget)
    _check_device(device)
    slide = Path(path)
    _check_file(slide)
    tags = read_tiff_tags(slide) if is_tiff(slide) else None
    _check_segments(slide, tags, pixel_budget)
    names = READERS if reader is None else (cast(ReaderName, reader),)
    backend = _probe(slide, tags, names, pixel_budget, device)
    mpp = _resolve_mpp(slide, tags, backend, base_mpp)
    if backend.name != "cucim":
        device = "cpu"
    logger.info(
        "%s: read by %s on the %s (%s, %d level(s))",
        slide,
        backend.library,
        "GPU" if device == "cuda" else "CPU",
        backend.vendor,
        len(backend.level_sizes),
    )
    # A child process that opens it again gets the same reader.
    request = OpenRequest(slide, base_mpp, backend.name, pixel_budget, device)
    return SlideReader(request, backend, mpp)


def slide_info(
    path: str | os.PathLike[str], *, base_mpp: float | None = None, reader: str | None = None
) -> dict[str, Any]:
    """Describe a slide in values that JSON holds.

    Args:
        path: Slide file.
        base_mpp: As in `open_slide`.
        reader: As in `open_slide`.

    Returns:
        path, reader, library, device, vendor, dimensions, levels (width, height, downsample), mpp
        (None without a usable one, then mpp_problem says why), mpp_source, compression, tile_px
        (None for strips and plain images), bytes and associated_images.

    Raises:
        InputError: As `open_slide`.
    """
    with open_slide(path, base_mpp=base_mpp, reader=reader) as slide:
        tags = read_tiff_tags(slide.path) if is_tiff(slide.path) else None
        page = tags.pages[0] if tags else None
        backend = slide.backend
        return {
            "path": str(slide.path),
            "reader": slide.name,
            "library": backend.library,
            "device": slide.device,
            "vendor": backend.vendor,
            "dimensions": list(slide.dimensions),
            "levels": [dataclasses.asdict(level) for level in slide.levels],
            "mpp": slide.base_resolution.value,
            "mpp_source": slide.mpp_source,
            "mpp_problem": slide.base_resolution.problem,
            "compression": tags.compression_name if tags else None,
            "tile_px": list(page.segment_px) if page and page.is_tiled else None,
            "bytes": slide.path.stat().st_size,
            "associated_images": list(backend.associated_images()),
        }


def _check_arguments(base_mpp: float | None, reader: str | None, pixel_budget: int) -> None:
    """Raise InputError at the first argument that breaks its rule."""
    if base_mpp is not None and not _is_plausible(base_mpp):
        raise InputError(
            f"base_mpp must lie in {MIN_MPP}..{MAX_MPP:g} microns per pixel, got {base_mpp}; a 40x "
            "scan has about 0.25, a 20x scan 0.5"
        )
    if reader is not None and reader not in READERS:
        raise InputError(
            f"reader must be one of {', '.join(READERS)}, got {reader!r}; leave it out to let the "
            "file decide"
        )
    if pixel_budget < 1:
        raise InputError(f"pixel_budget must be >= 1, got {pixel_budget}; try {PIXEL_BUDGET}")


def _check_device(device: str) -> None:
    """Raise InputError for a device that can't decode here."""
    if device not in get_args(DeviceName):
        raise InputError(f"device must be cpu or cuda, got {device!r}; the default is cpu")
    if device == "cuda":
        _reader_cucim.require_cuda()


def _check_file(path: Path) -> None:
    """Raise SlideError unless the path is a file with bytes that can be read."""
    if "\0" in str(path):
        raise SlideError(f"slide must be a path without NUL, got {str(path)!r}; rename the file")
    if not path.exists():
        raise SlideError(f"slide must be an existing file, got {path}; check the path")
    if not path.is_file():
        raise SlideError(f"slide must be a file, got the folder {path}; name the files inside it")
    if not os.access(path, os.R_OK):
        raise SlideError(f"slide must be readable by you, got {path}; check its permissions")
    if path.stat().st_size == 0:
        raise SlideError(f"slide must not be empty, got {path} with 0 bytes; copy it again")


def _check_segments(path: Path, tags: TiffTags | None, pixel_budget: int) -> None:
    """Refuse file tiles whose declared size is over the budget: readers allocate them whole."""
    for page in tags.levels if tags else ():
        if page.is_tiled and math.prod(page.segment_px) > pixel_budget:
            raise SlideError(
                f"file tiles of {path} must have at most {pixel_budget} pixels, got "
                f"{page.segment_px[0]} x {page.segment_px[1]}; write it with smaller tiles"
            )


def _probe(
    path: Path,
    tags: TiffTags | None,
    names: tuple[ReaderName, ...],
    pixel_budget: int,
    device: DeviceName,
) -> Backend:
    """Try readers in turn; return the first that reads every level."""
    vendor = detect_vendor(path)
    openers: dict[ReaderName, Callable[[], Backend]] = {
        "cucim": lambda: _open_cucim(path, tags, vendor, device),
        "openslide": lambda: _open_openslide(path, tags, vendor),
        "image": lambda: ImageBackend(path, tags, pixel_budget),
    }
    reasons = []
    for name in names:
        try:
            backend = openers[name]()
        except (SlideError, ImportError) as error:
            reasons.append(f"{name}: {error}")
            continue
        try:
            _read_probe(backend)
        except SlideError as error:
            backend.close()
            reasons.append(f"{name}: {error}")
        else:
            for reason in reasons:
                logger.debug("%s: %s", path, reason)
            return backend
    raise SlideError(
        f"slide must be readable by {' or '.join(names)}, got {path} ({'; '.join(reasons)}); "
        "check that it is a slide, or convert it to a tiled TIFF"
    )


def _open_cucim(
    path: Path, tags: TiffTags | None, vendor: str | None, device: DeviceName
) -> Backend:
    """Open with cuCIM, unless the file is one that it reads wrongly."""
    reason = _reader_cucim.refusal(tags, vendor)
    if reason is not None or tags is None:
        raise SlideError(reason or "not a TIFF file")
    return _reader_cucim.CucimBackend(path, tags, vendor, device)


def _open_openslide(path: Path, tags: TiffTags | None, vendor: str | None) -> Backend:
    """Open with OpenSlide, unless it would miss levels."""
    if vendor is None:
        raise SlideError("unsupported or damaged file")
    if tags is not None and tags.has_subifds and vendor == "generic-tiff":
        raise SlideError("levels in SubIFDs are not seen")
    return OpenSlideBackend(path)


def _read_probe(backend: Backend) -> None:
    """Read a small region of each level: a reader that fails at the middle and all corners is out.

    One damaged tile must cost that tile and not the slide, hence the further places.
    """
    for level, (width, height) in enumerate(backend.level_sizes):
        size = min(_PROBE_PX, width), min(_PROBE_PX, height)
        right, bottom = width - size[0], height - size[1]
        # From the edge of a file tile: a place in the middle of a level would touch four.
        wide, tall = backend.tile_sizes[level] or (1, 1)
        middle = right // 2 // wide * wide, bottom // 2 // tall * tall
        places = [middle, (0, 0), (right, 0), (0, bottom), (right, bottom)]
        for x, y in places:
            try:
                backend.read(x, y, size, level)
                break
            except SlideError as error:
                if (x, y) == places[-1]:
                    raise
                logger.debug("probe failed: %s", error)


def _resolve_mpp(
    path: Path, tags: TiffTags | None, backend: Backend, base_mpp: float | None
) -> Mpp:
    """Decide the base resolution: the user's value, or what the metadata say."""
    found = _metadata_mpp(tags, backend)
    stated = _judge(found)
    if base_mpp is None:
        return stated
    if stated.value is not None and abs(stated.value / base_mpp - 1) > _MPP_TOLERANCE:
        logger.warning(
            "%s: base_mpp %g given, but the metadata say %g; using %g",
            path,
            base_mpp,
            stated.value,
            base_mpp,
        )
    return Mpp(base_mpp, "option")


def _judge(found: tuple[float, float] | None) -> Mpp:
    """Accept metadata, or say what is wrong with them."""
    if found is None:
        return Mpp(None, None, "none in its metadata")
    x, y = found
    if not (_is_plausible(x) and _is_plausible(y)):
        return Mpp(None, None, f"{x:g} x {y:g} from its metadata")
    if max(x, y) / min(x, y) - 1 > _MPP_TOLERANCE:
        return Mpp(None, None, f"{x:g} along x and {y:g} along y from its metadata")
    return Mpp((x + y) / 2, "metadata")


def _metadata_mpp(tags: TiffTags | None, backend: Backend) -> tuple[float, float] | None:
    """Microns per pixel along x and y: vendor's metadata first, resolution tags last.

    The Aperio field is read from the tags, so that the value does not depend on the reader.
    """
    aperio = tags.aperio_mpp() if tags else None
    if aperio is not None:
        return aperio, aperio
    found = (tags.described_mpp() if tags else None) or backend.metadata_mpp()
    if found is None and tags is not None and not tags.is_aperio:
        found = tags.resolution_mpp()
    return None if found is None or _is_placeholder(found) else found


def _is_placeholder(mpp: tuple[float, float]) -> bool:
    """Whether a resolution is one that software writes for want of a better one."""
    return any(
        all(math.isclose(_MICRONS_PER_INCH / value, dpi, rel_tol=0.015) for value in mpp)
        for dpi in _PLACEHOLDER_DPI
    )


def _is_plausible(mpp: float) -> bool:
    """Whether a resolution can be a microscope's; False for NaN."""
    return math.isfinite(mpp) and MIN_MPP <= mpp <= MAX_MPP
