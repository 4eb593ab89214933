"""What every side of the end-to-end comparison is given: a slide of tissue, and one encoder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.benchmarks.decode_slides import JPEG_QUALITY
from modaltune.engine.encoders.export import export_encoder
from modaltune.engine.encoders.loading import load_eager
from modaltune.engine.encoders.registry import DEFAULT_ENCODER
from modaltune.engine.encoders.runtime_choice import open_runtime
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide
from modaltune.engine.tissue import tissue_mask

TILE_PX, MPP, SIDE_TILES, SMALL_SIDE_TILES = 256, 0.5, 32, 4
WINDOW_PX = 512

Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Workplace:
    """Where slide and encoder lie, and what jobs say of them."""

    folder: Path
    slide: Path
    small_slide: Path
    tiles: int
    facts: dict[str, Any]

    def job(self, tool: str, encoder: str) -> dict[str, Any]:
        """Return what a tool with one kind of encoder is asked to do, but for its own files."""
        # slide2vec hands normalised pixels on; the other tools hand on bytes.
        graph = "outside" if tool == "slide2vec" else "inside"
        width = 27 if encoder == "null" else self.facts["width"]
        return {
            **self.facts,
            "tool": tool,
            "encoder": encoder,
            "slide": str(self.slide),
            "small_slide": str(self.small_slide),
            "graph": str(self.folder / f"{graph}.onnx"),
            "width": width,
        }


def densest_window(rgb: Rgb, side: int) -> Rgb:
    """Return the square of an image that has the most tissue.

    Raises:
        InputError: The image is smaller, or no square is tissue through and through.
    """
    if min(rgb.shape[:2]) < side:
        raise InputError(f"slide must have at least {side} px a side, got {list(rgb.shape[:2])}")
    sums = np.pad(tissue_mask(rgb).astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    shares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(int(shares.argmax()), shares.shape)
    if shares[y, x] < 0.99 * side**2:
        raise InputError(f"slide must have a square of {side} px of tissue, got none; use another")
    return np.ascontiguousarray(rgb[y : y + side, x : x + side])


def write_slide(path: Path, source: Path, side_tiles: int) -> Path:
    """Write a JPEG pyramid of tissue and nothing else: one piece of a slide, mirrored at its seams.

    All tissue, so that every tool takes the same tiles, whatever its rule of tissue.

    Raises:
        InputError: The source has too little tissue.
    """
    with open_slide(source) as slide:
        piece = densest_window(slide.read_region((0, 0), slide.dimensions), WINDOW_PX)
    rows = np.concatenate([piece, piece[::-1]])
    pair = np.concatenate([rows, rows[:, ::-1]], axis=1)
    side = side_tiles * TILE_PX
    repeats = -(-side // len(pair))
    rgb = np.ascontiguousarray(np.tile(pair, (repeats, repeats, 1))[:side, :side])
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = max(1, side_tiles.bit_length() - 1)  # the coarsest is 512 px or more
    return write_pyramid(
        path, rgb, mpp=MPP, levels=levels, compression="jpeg", quality=JPEG_QUALITY
    )


def default_folder() -> Path:
    """Where the slide is kept between runs."""
    return Path(tempfile.gettempdir()) / "modaltune-bench-end-to-end"


def prepare(folder: Path, source: Path, side_tiles: int = SIDE_TILES) -> Workplace:
    """Write slides, weights and graphs; measure once which runtime and layout are fastest here.

    Raises:
        InputError: The source can't be used.
    """
    from safetensors.torch import save_file

    slides = {side: folder / f"{source.stem}-{side}.tif" for side in (side_tiles, SMALL_SIDE_TILES)}
    for side, path in slides.items():
        if not path.exists():
            write_slide(path, source, side)
    eager = load_eager(DEFAULT_ENCODER)
    spec = eager.spec
    state = {
        name: value.contiguous() for name, value in eager.features.network.state_dict().items()
    }
    save_file(state, folder / "weights.safetensors")
    for place in ("inside", "outside"):
        export_encoder(eager, folder / f"{place}.onnx", preprocessing=place)
    chosen = open_runtime(eager, "auto", tile_px=TILE_PX)
    layout = {"workers": 1, "threads": 2, "batch_size": 2, **chosen.settings().get("layout", {})}
    facts = {
        "architecture": spec.architecture,
        "weights": str(folder / "weights.safetensors"),
        "input_px": spec.input_px,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "width": spec.width,
        "min_foreground": 0.95,
        "layout": layout,
    }
    tiles = side_tiles**2 + SMALL_SIDE_TILES**2
    return Workplace(folder, slides[side_tiles], slides[SMALL_SIDE_TILES], tiles, facts)
