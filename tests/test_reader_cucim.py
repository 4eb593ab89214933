"""What cuCIM is asked to decode: large regions by several threads, and little at opening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from modaltune.engine._reader_cucim import CucimBackend
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide

Rgb = npt.NDArray[np.uint8]


def picture(height: int, width: int) -> Rgb:
    """Smooth coloured noise."""
    noise = np.random.default_rng(0).integers(0, 240, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 2), dtype=np.uint8)


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_a_large_region_is_read_as_tifffile_decodes_it(tmp_path: Path, codec: Any) -> None:
    """Large enough for several threads, where cuCIM's are safe with damaged tiles."""
    side = 1500
    path = write_pyramid(
        tmp_path / "a.tif", picture(side, side), mpp=0.5, tile_px=256, compression=codec
    )
    rgb = tifffile.imread(path)
    with open_slide(path, reader="cucim") as slide:
        expected = np.full_like(rgb, 255)
        expected[: side - 13, 50:] = rgb[13:, : side - 50]
        for _ in range(3):
            whole = slide.read_region((0, 0), (side, side))
            np.testing.assert_array_equal(whole, rgb)
            np.testing.assert_array_equal(slide.read_region((-50, 13), (side, side)), expected)


def test_opening_decodes_one_file_tile_of_each_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", picture(320, 448), mpp=0.5, levels=3, tile_px=128, compression="jpeg"
    )
    places: list[tuple[int, int, tuple[int, int], int]] = []
    read = CucimBackend.read

    def recorded(backend: CucimBackend, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        places.append((x, y, size, level))
        return read(backend, x, y, size, level)

    monkeypatch.setattr(CucimBackend, "read", recorded)
    with open_slide(path, reader="cucim") as slide:
        levels = slide.levels
    assert [level for *_, level in places] == [0, 1, 2]
    for x, y, (width, height), level in places:
        assert x // 128 == (x + width - 1) // 128
        assert y // 128 == (y + height - 1) // 128
        assert 0 <= x <= levels[level].width - width
        assert 0 <= y <= levels[level].height - height
    assert places[0][:2] == (128, 128)  # near the middle of 448 x 320 px
