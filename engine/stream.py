"""Slides to feature files: open, find tissue, tile, encode, write; one outcome per slide."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from modaltune.engine.cohort import SlideItem
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import InputError
from modaltune.engine.overlay import write_overlay
from modaltune.engine.profile import StageTimer
from modaltune.engine.readers import MIN_MPP, SlideReader, open_slide
from modaltune.engine.store import (
    TileFeatures,
    feature_recipe,
    is_complete,
    open_features,
    write_features,
)
from modaltune.engine.tiling import TileGrid, read_tiles, tile_slide
from modaltune.engine.tissue import find_tissue

logger = logging.getLogger(__name__)

READ_TILES = 64  # tiles decoded before each call of the encoder: 12 MB of 256-px RGB
MAX_TILE_MPP, MAX_TILE_PX = 100.0, 8192  # beyond, an option was mistyped

Status = Literal["done", "empty", "kept", "failed"]


@dataclass(frozen=True)
class EmbedOptions:
    """How slides become features; all of it goes into the recipe that resume compares.

    Attributes:
        mpp: Microns per pixel of a tile.
        tile_px: Side of a tile in px at `mpp`.
        min_foreground: Least share of tissue of a kept tile, 0..1.
        tissue: Rule of the tissue mask.
        dtype: Type of the stored features.
        reader: One slide reader only, or None to probe.
        overlays: Whether to write a picture of mask and tiles beside the features.

    Raises:
        InputError: A resolution or a size that no tile has.
    """

    mpp: float = 0.5
    tile_px: int = 256
    min_foreground: float = 0.95
    tissue: Literal["lab", "lab-mean", "otsu", "hsv"] = "lab"
    dtype: Literal["float32", "float16"] = "float32"
    reader: str | None = None
    overlays: bool = True

    def __post_init__(self) -> None:
        if not MIN_MPP <= self.mpp <= MAX_TILE_MPP:
            raise InputError(
                f"--mpp must lie in {MIN_MPP}..{MAX_TILE_MPP:g} microns per pixel of a tile, got "
                f"{self.mpp}; the published model takes 0.5"
            )
        if not 1 <= self.tile_px <= MAX_TILE_PX:
            raise InputError(
                f"--tile-px must lie in 1..{MAX_TILE_PX}, got {self.tile_px}; the published model "
                "takes 256"
            )


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide.

    Attributes:
        slide_id: The slide.
        case_id: Its patient.
        status: `done`, `empty` (no tiles, and why), `kept` (finished before), or `failed`.
        tiles: Number of tiles.
        features: The feature file, None for a failed slide.
        reason: Why it is empty or failed.
        reader: Which reader decoded it.
        seconds: Wall-clock seconds.
    """

    slide_id: str
    case_id: str
    status: Status
    tiles: int = 0
    features: Path | None = None
    reason: str = ""
    reader: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class EmbedReport:
    """The outcome of a run: slides, totals and the split of its time."""

    outcomes: tuple[SlideOutcome, ...]
    stages_s: dict[str, float]
    elapsed_s: float
    encoder: str
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, status: Status) -> list[SlideOutcome]:
        """Return the slides of one status."""
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def new_tiles(self) -> int:
        """Tiles encoded in this run."""
        return sum(outcome.tiles for outcome in self.of("done"))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        slides = [
            {**asdict(o), "features": None if o.features is None else str(o.features)}
            for o in self.outcomes
        ]
        hours = self.elapsed_s / 3600
        return {
            "encoder": self.encoder,
            "settings": self.settings,
            "slides": slides,
            "counts": {s: len(self.of(s)) for s in ("done", "empty", "kept", "failed")},
            "tiles": self.new_tiles,
            "elapsed_s": self.elapsed_s,
            "stages_s": self.stages_s,
            "tiles_per_s": self.new_tiles / self.elapsed_s if self.elapsed_s else 0.0,
            "slides_per_h": len(self.of("done")) / hours if hours else 0.0,
        }


def features_folder(out: Path, encoder: TileEncoder) -> Path:
    """Return the folder of an encoder's feature files below an output folder."""
    return out / f"features_{encoder.spec.slug}"


def embed_slides(
    items: Sequence[SlideItem],
    encoder: TileEncoder,
    out: str | Path,
    options: EmbedOptions | None = None,
    *,
    on_tiles: Callable[[SlideItem, int, int], None] | None = None,
    on_slide: Callable[[SlideOutcome], None] | None = None,
) -> EmbedReport:
    """Turn slides into feature files; a slide that fails costs itself only.

    Slides finished by the same recipe are kept as they are. A file made by another recipe is never
    overwritten: that slide fails and says what differs.

    Args:
        items: The slides, with distinct ids.
        encoder: The tile encoder.
        out: Output folder; features go to `features_<encoder>/<slide>.h5` below it.
        options: How to tile; the published recipe unless given.
        on_tiles: Called with the slide, tiles done and tiles in all.
        on_slide: Called with each outcome.

    Returns:
        The outcomes in the order of `items`, and where the time went.
    """
    options = options or EmbedOptions()
    folder = features_folder(Path(out), encoder)
    recipe = feature_recipe(
        encoder=encoder.name,
        encoder_sha256=encoder.weights_sha256,
        target_mpp=options.mpp,
        tile_px=options.tile_px,
        dtype=options.dtype,
        min_foreground=options.min_foreground,
        tissue=options.tissue,
    )
    timer = StageTimer()
    outcomes = []
    for item in items:
        before = timer.elapsed_s
        try:
            outcome = _embed_one(item, encoder, folder, options, recipe, timer, on_tiles)
        except InputError as error:
            logger.error("slide %s failed: %s", item.slide_id, error)
            outcome = SlideOutcome(item.slide_id, item.case_id, "failed", reason=str(error))
        outcome = SlideOutcome(**{**vars(outcome), "seconds": timer.elapsed_s - before})
        outcomes.append(outcome)
        if on_slide is not None:
            on_slide(outcome)
    return EmbedReport(
        tuple(outcomes),
        timer.split(),
        timer.elapsed_s,
        encoder.name,
        json.loads(json.dumps(recipe)),
    )


def _embed_one(
    item: SlideItem,
    encoder: TileEncoder,
    folder: Path,
    options: EmbedOptions,
    recipe: dict[str, Any],
    timer: StageTimer,
    on_tiles: Callable[[SlideItem, int, int], None] | None,
) -> SlideOutcome:
    target = folder / f"{item.slide_id}.h5"
    if item.base_mpp is not None:
        recipe = {**recipe, "base_mpp_given": item.base_mpp}
    finished = _finished(item, target, recipe)
    if finished is not None:
        return finished
    with timer.stage("open"):
        slide = open_slide(item.path, base_mpp=item.base_mpp, reader=options.reader)
    with slide:
        base_mpp = slide.mpp  # a slide without one fails here, before any work
        with timer.stage("mask"):
            tissue = find_tissue(slide, options.tissue)
            grid = tile_slide(
                slide,
                tissue,
                tile_px=options.tile_px,
                mpp=options.mpp,
                min_foreground=options.min_foreground,
            )
        features = _encode(item, slide, grid, encoder, timer, on_tiles)
        with timer.stage("write"):
            if options.overlays:
                write_overlay(
                    folder.parent / "overlays" / f"{item.slide_id}.png", slide, tissue, grid
                )
            write_features(
                target,
                TileFeatures(
                    slide=item.slide_id,
                    features=features,
                    coords=grid.coords,
                    tile_px=grid.tile_px,
                    level0_tile_px=grid.tile_px_level0,
                    target_mpp=options.mpp,
                    base_mpp=base_mpp,
                    encoder=encoder.name,
                    encoder_sha256=encoder.weights_sha256,
                    level0_size=slide.dimensions,
                    reader=slide.name,
                    extra={
                        "mpp_source": slide.mpp_source,
                        "tissue_share": tissue.share,
                        **encoder.provenance(),
                    },
                    recipe=recipe,
                    empty_reason=grid.reason or None,
                ),
                dtype=options.dtype,
            )
    status: Status = "done" if len(grid) else "empty"
    return SlideOutcome(
        item.slide_id, item.case_id, status, len(grid), target, grid.reason, slide.name
    )


def _finished(item: SlideItem, target: Path, recipe: dict[str, Any]) -> SlideOutcome | None:
    """Return the outcome of a slide that needs no work, or None.

    Raises:
        InputError: There is a file that this run must not replace.
    """
    found = is_complete(target, recipe)
    if found == "missing":
        return None
    if found in ("done", "empty"):
        kept = open_features(target)
        return SlideOutcome(
            item.slide_id, item.case_id, "kept", len(kept), target, kept.empty_reason or ""
        )
    if found[0] == "damaged":
        logger.warning("%s is damaged (%s); it is made again", target, found[1])
        return None
    raise InputError(
        f"{target} must have been made by this run's settings, got others: {', '.join(found[1])}; "
        "use another --out, or delete the file"
    )


def _encode(
    item: SlideItem,
    slide: SlideReader,
    grid: TileGrid,
    encoder: TileEncoder,
    timer: StageTimer,
    on_tiles: Callable[[SlideItem, int, int], None] | None,
) -> npt.NDArray[np.float32]:
    """Return the features `[N, D]` of a grid's tiles."""
    features = np.empty((len(grid), encoder.width), dtype=np.float32)
    tiles: Iterator[npt.NDArray[np.uint8]] = read_tiles(slide, grid)
    done = 0
    if on_tiles is not None:
        on_tiles(item, 0, len(grid))
    while done < len(grid):
        with timer.stage("read"):
            block = np.stack(list(islice(tiles, READ_TILES)))
        with timer.stage("encode"):
            features[done : done + len(block)] = encoder.encode(block).numpy()
        done += len(block)
        if on_tiles is not None:
            on_tiles(item, done, len(grid))
    return features
