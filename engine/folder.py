"""Slides to feature files by the ledger of an output folder: nothing finished is lost or redone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from modaltune.engine.cohort import SlideItem
from modaltune.engine.decode import DecodeOptions, TileDecoder, TileOptions
from modaltune.engine.encoded_slide import EncodedSlide
from modaltune.engine.errors import DiskFullError, InputError, SlideError
from modaltune.engine.ledger import Lease, Ledger, SlideRow
from modaltune.engine.ledger_work import Claims, settles
from modaltune.engine.own_features import FileFacts
from modaltune.engine.profile import Observer, StreamClock
from modaltune.engine.readers import MIN_MPP
from modaltune.engine.recipes import slide_recipe
from modaltune.engine.store import TileFeatures, feature_recipe, record_features
from modaltune.engine.stream import SlideStream, StreamOptions

if TYPE_CHECKING:
    from modaltune.engine.encoders.runtime import TileEncoder

MAX_TILE_MPP, MAX_TILE_PX = 100.0, 8192  # beyond, an option was mistyped
_SURVEY_BLOCKS = 5  # a survey may take as long as so many blocks of tiles

Status = Literal["done", "empty", "kept", "failed", "quarantined"]
STATUSES = get_args(Status)
FINISHED = ("done", "empty")


@dataclass(frozen=True)
class EmbedOptions:
    """How slides become features.

    All but `reader`, `overlays`, `workers`, `bad_share` and `decode_timeout_s` goes into the recipe
    that resume compares.

    Attributes:
        mpp: Microns per pixel of a tile.
        tile_px: Side of a tile in px at `mpp`.
        min_foreground: Least share of tissue of a kept tile, 0..1.
        tissue: Rule of the tissue mask.
        dtype: Type of the stored features.
        half_scale_jpeg: Decode JPEG tiles at half scale where that fits; pixels differ slightly.
        reader: One slide reader only, or None to probe.
        overlays: Whether to write a picture of mask and tiles beside the features.
        workers: Decoding processes; None starts 2, and more while the encoder waits for them.
        bad_share: Share of a slide's tiles that may be unreadable, 0..1.
        decode_timeout_s: Seconds for one block of tiles, and five times that for opening a slide
            and finding its tissue; then it fails.

    Raises:
        InputError: A resolution or a size that no tile has, or another number out of range.
    """

    mpp: float = 0.5
    tile_px: int = 256
    min_foreground: float = 0.95
    tissue: Literal["lab", "lab-mean", "otsu", "hsv"] = "lab"
    dtype: Literal["float32", "float16"] = "float32"
    half_scale_jpeg: bool = False
    reader: str | None = None
    overlays: bool = True
    workers: int | None = None
    bad_share: float = 0.01
    decode_timeout_s: float = 120.0

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
        self.stream_options()

    def recipe(self, encoder: TileEncoder) -> dict[str, Any]:
        """Return what features made this way must agree in."""
        half = {"half_scale_jpeg": True} if self.half_scale_jpeg else {}
        return feature_recipe(
            encoder=encoder.name,
            encoder_sha256=encoder.weights_sha256,
            target_mpp=self.mpp,
            tile_px=self.tile_px,
            dtype=self.dtype,
            min_foreground=self.min_foreground,
            tissue=self.tissue,
            **half,
        )

    def stream_options(self) -> StreamOptions:
        """Return how the stream runs."""
        tiles = TileOptions(
            mpp=self.mpp,
            tile_px=self.tile_px,
            min_foreground=self.min_foreground,
            tissue=self.tissue,
            reader=self.reader,
        )
        return StreamOptions(
            DecodeOptions(
                tiles=tiles,
                workers=self.workers,
                half_scale_jpeg=self.half_scale_jpeg,
                bad_share=self.bad_share,
                decode_timeout_s=self.decode_timeout_s,
                survey_timeout_s=_SURVEY_BLOCKS * self.decode_timeout_s,
            )
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
        seconds: From its claim to its commit.
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
    """The outcome of a run: slides, totals and where its time went.

    Attributes:
        outcomes: Of every slide, in the order given.
        stages_s: Seconds by stage of all workers side by side, and the encoder's `idle`.
        elapsed_s: Seconds that passed.
        encoder: Name of the tile encoder.
        settings: The recipe.
        encoder_busy: Share of the time between its first and last batch that the encoder worked.
    """

    outcomes: tuple[SlideOutcome, ...]
    stages_s: dict[str, float]
    elapsed_s: float
    encoder: str
    settings: dict[str, Any] = field(default_factory=dict)
    encoder_busy: float = 0.0

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
            "encoder_busy": self.encoder_busy,
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
    new_recipe: bool = False,
    on_tiles: Callable[[int], None] | None = None,
    on_slide: Callable[[SlideOutcome], None] | None = None,
    observe: Observer | None = None,
    decoder: TileDecoder | None = None,
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
        on_tiles: Called with the number of tiles encoded so far, from several threads.
        on_slide: Called with each outcome.
        observe: Called, from several threads, with every stretch of work.
        decoder: A decoder of `options` that runs already; closed at the end where it is used.

    Returns:
        The outcomes in the order of `items`, and where the time went.

    Raises:
        RecipeChangedError: Finished slides were made by other settings.
        LedgerError: The ledger can't be used.
        DiskFullError: There is no room; run again once there is.
        DeviceMemoryError: The encoder has no memory for a single tile; slides are given back.
    """
    options = options or EmbedOptions()
    out, folder = Path(out), features_folder(Path(out), encoder)
    recipe = options.recipe(encoder)
    opened = Ledger.open(out, recipe, items, features=folder.name, new_recipe=new_recipe)
    with opened as ledger, ledger.beating():
        run = _Run(ledger, out, on_slide)
        run.tell(FINISHED)
        clock = StreamClock()
        if ledger.unsettled():  # else no process need be started
            source = Claims(ledger, out / "overlays" if options.overlays else None)
            stream = SlideStream(
                source, encoder, options.stream_options(), on_tiles=on_tiles, observe=observe,
                decoder=decoder,
            )  # fmt: skip
            clock = stream.clock
            with stream:
                for slide in stream:
                    lease = source.held.pop(slide.key)
                    with settles(ledger, lease, run.tell_row):
                        facts = _write(lease, slide, encoder, options, recipe, clock)
                        row = ledger.commit_done(lease, facts, timings=slide.seconds)
                        run.seconds[row.slide_id] = time.monotonic() - source.since.pop(slide.key)
                        run.tell_row(row)
        outcomes = run.tell(STATUSES)
    return EmbedReport(
        outcomes, clock.split(), clock.elapsed_s, encoder.name, recipe, clock.encoder_busy
    )


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


def _write(
    lease: Lease,
    slide: EncodedSlide,
    encoder: TileEncoder,
    options: EmbedOptions,
    recipe: dict[str, Any],
    clock: StreamClock,
) -> FileFacts:
    """Write one slide's feature file.

    Raises:
        SlideError: The slide failed.
        DiskFullError: Its overlay or its features have no room.
    """
    survey = slide.survey
    if slide.status == "failed" or survey is None:
        raise DiskFullError(slide.reason) if slide.is_disk_full else SlideError(slide.reason)
    lost = {"bad_tiles": slide.bad_tiles} if slide.bad_tiles else {}
    size = {"slide_bytes": survey.stamp[1]} if survey.stamp else {}
    with clock.stage("write", slide.key):
        return record_features(
            lease.features,
            TileFeatures(
                slide=slide.key,
                features=slide.features,
                coords=slide.coords,
                tile_px=survey.grid.tile_px,
                level0_tile_px=survey.grid.tile_px_level0,
                target_mpp=options.mpp,
                base_mpp=survey.grid.base_mpp,
                encoder=encoder.name,
                encoder_sha256=encoder.weights_sha256,
                level0_size=survey.grid.dimensions,
                reader=survey.reader,
                extra={
                    "mpp_source": survey.mpp_source,
                    "tissue_share": survey.tissue_share,
                    **size,
                    **lost,
                    **encoder.provenance(),
                },
                recipe=slide_recipe(recipe, lease.item.base_mpp),
                empty_reason=survey.grid.reason or None,
            ),
            dtype=options.dtype,
        )
