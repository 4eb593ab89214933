"""Slides to feature files: open, find tissue, tile, encode, write; one outcome per slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from modaltune.engine.cohort import SlideItem
from modaltune.engine.encoders.torch_runtime import TileEncoder
from modaltune.engine.errors import InputError
from modaltune.engine.ledger import Lease, Ledger, SlideRow
from modaltune.engine.ledger_work import leases, settles
from modaltune.engine.overlay import write_overlay
from modaltune.engine.own_features import FileFacts
from modaltune.engine.profile import StageTimer
from modaltune.engine.readers import MIN_MPP, SlideReader, open_slide
from modaltune.engine.recipes import slide_recipe
from modaltune.engine.store import TileFeatures, feature_recipe, record_features
from modaltune.engine.tiling import TileGrid, read_tiles, tile_slide
from modaltune.engine.tissue import find_tissue

READ_TILES = 64  # tiles decoded before each call of the encoder: 12 MB of 256-px RGB
MAX_TILE_MPP, MAX_TILE_PX = 100.0, 8192  # beyond, an option was mistyped

Status = Literal["done", "empty", "kept", "failed", "quarantined"]
STATUSES = get_args(Status)
FINISHED = ("done", "empty")


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
        status: `done`, `empty` (no tiles, and why), `kept` (finished before, or by another
            process), `quarantined` (failed too often, and left alone until `modaltune retry`), or
            `failed` (failed, and will be tried again by the next run).
        tiles: Number of tiles.
        features: The feature file, None for a slide that could not be embedded.
        reason: Why it is empty or could not be embedded.
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
    def lost(self) -> list[SlideOutcome]:
        """The slides that could not be embedded."""
        return [*self.of("failed"), *self.of("quarantined")]

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
            "counts": {s: len(self.of(s)) for s in STATUSES},
            "tiles": self.new_tiles,
            "elapsed_s": self.elapsed_s,
            "stages_s": self.stages_s,
            "tiles_per_s": self.new_tiles / self.elapsed_s if self.elapsed_s else 0.0,
            "slides_per_h": len(self.of("done")) / hours if hours else 0.0,
        }


def features_folder(out: Path, encoder: TileEncoder) -> Path:
    """Return the folder of an encoder's feature files below an output folder."""
    return out / f"features_{encoder.spec.slug}"


def run_recipe(encoder: TileEncoder, options: EmbedOptions) -> dict[str, Any]:
    """Return what the features of a run depend on, apart from the slides."""
    return feature_recipe(
        encoder=encoder.name,
        encoder_sha256=encoder.weights_sha256,
        target_mpp=options.mpp,
        tile_px=options.tile_px,
        dtype=options.dtype,
        min_foreground=options.min_foreground,
        tissue=options.tissue,
    )


def embed_slides(
    items: Sequence[SlideItem],
    encoder: TileEncoder,
    out: str | Path,
    options: EmbedOptions | None = None,
    *,
    new_recipe: bool = False,
    on_tiles: Callable[[SlideItem, int, int], None] | None = None,
    on_slide: Callable[[SlideOutcome], None] | None = None,
) -> EmbedReport:
    """Turn slides into feature files; a slide that fails costs itself only.

    The ledger in `out` (`modaltune.engine.ledger`) says what is finished: such slides are kept as
    they are, and any number of processes share the rest. A slide that fails is tried again after
    the others, and left alone after three attempts.

    Args:
        items: The slides, with distinct ids.
        encoder: The tile encoder.
        out: Output folder; features go to `features_<encoder>/<slide>.h5` below it.
        options: How to tile; the published recipe unless given.
        new_recipe: Make slides again that were finished by other settings; refused otherwise.
        on_tiles: Called with the slide, tiles done and tiles in all.
        on_slide: Called with each outcome.

    Returns:
        The outcomes in the order of `items`, and where the time went.

    Raises:
        RecipeChangedError: Finished slides were made by other settings.
        LedgerError: The ledger can't be used.
        DiskFullError: There is no room; run again once there is.
    """
    options = options or EmbedOptions()
    folder, recipe = features_folder(Path(out), encoder), run_recipe(encoder, options)
    timer = StageTimer()
    opened = Ledger.open(out, recipe, items, features=folder.name, new_recipe=new_recipe)
    with opened as ledger, ledger.beating():
        run = _Run(ledger, Path(out), on_slide)
        run.tell(FINISHED)
        for lease in leases(ledger):
            if lease is None:
                continue
            before, start = dict(timer.seconds), timer.elapsed_s
            with settles(ledger, lease, run.tell_row):
                facts = _embed_one(lease, encoder, options, recipe, timer, on_tiles)
                spent = {stage: timer.seconds[stage] - before[stage] for stage in before}
                row = ledger.commit_done(lease, facts, timings=spent)
                run.seconds[row.slide_id] = timer.elapsed_s - start
                run.tell_row(row)
        outcomes = run.tell(STATUSES)
    return EmbedReport(outcomes, timer.split(), timer.elapsed_s, encoder.name, recipe)


class _Run:
    """What became of a run's slides, and who was told so far."""

    def __init__(
        self, ledger: Ledger, out: Path, on_slide: Callable[[SlideOutcome], None] | None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._ledger, self._out, self._on_slide = ledger, out, on_slide
        self._told: set[str] = set()

    def tell(self, statuses: Sequence[str]) -> tuple[SlideOutcome, ...]:
        """Return the slides of some statuses and tell of those not told of yet."""
        rows = [row for row in self._ledger.rows() if row.status in statuses]
        for row in rows:
            self.tell_row(row)
        return tuple(self._outcome(row) for row in rows)

    def tell_row(self, row: SlideRow) -> None:
        """Tell of one slide, unless it is tried again."""
        if self._on_slide is not None and row.status != "failed" and row.slide_id not in self._told:
            self._told.add(row.slide_id)
            self._on_slide(self._outcome(row))

    def _outcome(self, row: SlideRow) -> SlideOutcome:
        is_finished = row.status in FINISHED
        status = "kept" if is_finished and row.slide_id not in self.seconds else row.status
        return SlideOutcome(
            row.slide_id,
            row.case_id,
            cast(Status, status),
            row.tiles,
            self._out / row.features if is_finished else None,
            row.reason,
            row.reader,
            self.seconds.get(row.slide_id, 0.0),
        )


def _embed_one(
    lease: Lease,
    encoder: TileEncoder,
    options: EmbedOptions,
    recipe: dict[str, Any],
    timer: StageTimer,
    on_tiles: Callable[[SlideItem, int, int], None] | None,
) -> FileFacts:
    """Make one slide's feature file and overlay."""
    item, target = lease.item, lease.features
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
                    target.parent.parent / "overlays" / f"{item.slide_id}.png", slide, tissue, grid
                )
            return record_features(
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
                    extra={"mpp_source": slide.mpp_source, "tissue_share": tissue.share},
                    recipe=slide_recipe(recipe, item.base_mpp),
                    empty_reason=grid.reason or None,
                ),
                dtype=options.dtype,
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
