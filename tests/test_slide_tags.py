"""Resolutions that slides state in words: OME-TIFF and ImageJ, as other programs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from modaltune.engine._slide_tags import TiffTags, read_tiff_tags
from modaltune.engine.readers import open_slide

PIXELS = np.random.default_rng(0).integers(0, 200, (128, 192, 3), dtype=np.uint8)


def described(path: Path, text: str) -> TiffTags:
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", description=text)
    return read_tiff_tags(path)


@pytest.mark.parametrize("subifds", [0, 1])
@pytest.mark.parametrize(
    ("size", "unit", "mpp"), [(0.25, "µm", 0.25), (0.0005, "mm", 0.5), (499.0, "nm", 0.499)]
)
def test_ome_tiff(tmp_path: Path, subifds: int, size: float, unit: str, mpp: float) -> None:
    path = tmp_path / "a.ome.tif"
    said = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    said |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    options: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(PIXELS, subifds=subifds, metadata=said, **options)
        if subifds:
            writer.write(PIXELS[::2, ::2].copy(), subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == "metadata"
        assert len(slide.levels) == 1 + subifds


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_imagej(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "a.tif"
    resolution = (1 / 0.499, 1 / 0.499)
    tifffile.imwrite(path, PIXELS, imagej=True, resolution=resolution, metadata={"unit": unit})
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.499, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "mpp"),
    [
        ('<OME><Image><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.5"/></Image></OME>', (0.5, 0.5)),
        ("<ome:OME><ome:Pixels PhysicalSizeX='1' PhysicalSizeY='2'></ome:OME>", (1.0, 2.0)),
        ('<OME><Pixels SizeX="192" PhysicalSizeX="0.5"/></OME>', None),
        ('<OME><Pixels PhysicalSizeX="x" PhysicalSizeY="0.5"/></OME>', None),
        ('<OME><Pixels PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"/>', None),
        ("ImageJ=1.54\nunit=pixel\n", None),
        ("a photograph", None),
    ],
)
def test_descriptions(tmp_path: Path, text: str, mpp: tuple[float, float] | None) -> None:
    assert described(tmp_path / "a.tif", text).described_mpp() == mpp
