"""Write a tiled, pyramidal TIFF that OpenSlide, cuCIM and tifffile all see as one slide."""

from __future__ import annotations

import math
import os
import uuid
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from modaltune.engine.errors import InputError

Compression = Literal["deflate", "jpeg", "lzw", "jpeg2000", "none"]

# Our name -> tifffile's. JPEG 2000 goes under Aperio's tag 33005: cuCIM reads that one and fails on
# 34712, the tag of the TIFF registry.
_CODECS: dict[str, str | None] = {
    "none": None,
    "deflate": "ADOBE_DEFLATE",
    "lzw": "LZW",
    "jpeg": "JPEG",
    "jpeg2000": "APERIO_JP2000_RGB",
}
_DEFAULT_JPEG_QUALITY = 90
_MICRONS_PER_CM = 10_000.0
# Classic TIFF has 32-bit offsets; the margin leaves room for tags and for codecs that expand noise.
_CLASSIC_TIFF_BYTES = 3_500_000_000


def write_pyramid(
    path: str | os.PathLike[str],
    rgb: npt.NDArray[np.uint8],
    *,
    mpp: float | None,
    levels: int = 1,
    tile_px: int | None = 256,
    compression: Compression = "deflate",
    quality: int | None = None,
) -> Path:
    """Write an RGB image as a generic pyramidal TIFF, whole or not at all.

    Levels are further pages marked as reduced (no SubIFDs), each the area average of the last.

    Args:
        path: File to write; an existing one is replaced.
        rgb: Level-0 pixels, uint8 [h, w, 3], 0..255. A memory map works.
        mpp: Microns per level-0 pixel, stored as resolution tags per centimetre; None stores none.
        levels: Number of levels with level 0, >= 1.
        tile_px: Side of the square file tiles, a multiple of 16; None writes strips.
        compression: "deflate", "lzw" and "none" are lossless. "jpeg2000" is stored as RGB under
            Aperio's tag 33005.
        quality: JPEG quality 1..100 (90), or JPEG 2000 signal-to-noise ratio in dB (None or 0 is
            lossless). Not used by the other codecs.

    Returns:
        The path written.

    Raises:
        InputError: An argument breaks its rule.
        OSError: The file can't be written.

    Source: TIFF 6.0, tags 254 (NewSubfileType), 282, 283 and 296 (resolution).
    """
    target = Path(path)
    _check(rgb, mpp, levels, tile_px, compression, quality)
    if not target.parent.is_dir():
        raise InputError(
            f"path must lie in an existing folder, got {target}; create {target.parent} first"
        )
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_levels(temporary, rgb, mpp, levels, tile_px, compression, quality)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)
    return target


def _write_levels(
    path: Path,
    rgb: npt.NDArray[np.uint8],
    mpp: float | None,
    levels: int,
    tile_px: int | None,
    compression: Compression,
    quality: int | None,
) -> None:
    """Write every level as one page of a new file."""
    options: dict[str, Any] = {
        # The form of the array; tifffile has JPEG store it as YCbCr.
        "photometric": "rgb",
        "compression": _CODECS[compression],
        "compressionargs": _codec_arguments(compression, quality),
        "metadata": None,
        "software": "ModalTune",
    }
    if compression == "jpeg":
        options["subsampling"] = (2, 2)
    if tile_px is not None:
        options["tile"] = (tile_px, tile_px)
    bigtiff = rgb.nbytes * 4 // 3 > _CLASSIC_TIFF_BYTES
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        level_rgb = rgb
        for level in range(levels):
            if level:
                level_rgb = _half(level_rgb)
            if mpp is not None:
                # Per axis: an odd side is not exactly halved.
                options["resolution"] = tuple(
                    _MICRONS_PER_CM / mpp * level_rgb.shape[axis] / rgb.shape[axis]
                    for axis in (1, 0)
                )
                options["resolutionunit"] = "CENTIMETER"
            writer.write(level_rgb, subfiletype=1 if level else 0, **options)


def _half(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Average by area to half the size, uint8 [h // 2, w // 2, 3]."""
    height, width = max(1, rgb.shape[0] // 2), max(1, rgb.shape[1] // 2)
    half = cv2.resize(np.ascontiguousarray(rgb), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(half, dtype=np.uint8)


def _codec_arguments(compression: Compression, quality: int | None) -> dict[str, Any] | None:
    """Return the keyword arguments that tifffile hands to the codec."""
    if compression == "jpeg":
        return {"level": _DEFAULT_JPEG_QUALITY if quality is None else quality}
    if compression == "jpeg2000":
        return {"level": quality} if quality else {"level": 0, "reversible": True}
    return None


def _check(
    rgb: npt.NDArray[np.uint8],
    mpp: float | None,
    levels: int,
    tile_px: int | None,
    compression: str,
    quality: int | None,
) -> None:
    """Raise InputError at the first argument that breaks its rule."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.size == 0:
        raise InputError(
            f"rgb must be uint8 [h, w, 3] with pixels, got {rgb.dtype} {list(rgb.shape)}; "
            "convert the image to 8-bit RGB first"
        )
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f"mpp must be finite and > 0, got {mpp}; None writes no resolution")
    most = min(rgb.shape[:2]).bit_length()
    if not 1 <= levels <= most:
        raise InputError(
            f"levels must be 1..{most} for {rgb.shape[1]} x {rgb.shape[0]} px (each level halves "
            f"the last), got {levels}; write fewer levels"
        )
    if tile_px is not None and (tile_px < 16 or tile_px % 16):
        raise InputError(f"tile_px must be a multiple of 16 or None, got {tile_px}; try 256")
    if compression not in _CODECS:
        raise InputError(
            f"compression must be one of {', '.join(_CODECS)}, got {compression!r}; try deflate"
        )
    least = 1 if compression == "jpeg" else 0
    if quality is not None and not least <= quality <= 100:
        raise InputError(
            f"quality must be {least}..100 for {compression}, got {quality}; None picks the default"
        )


def _fsync_folder(folder: Path) -> None:
    """Flush the folder's entry, so that the rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
