"""The main job: slides to tile features, and with a model to embeddings per case."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.cohort import SlideItem, items_from_paths, read_manifest
from modaltune.engine.decode import TileDecoder
from modaltune.engine.encoders.registry import DEFAULT_ENCODER, get_spec, is_dynamic
from modaltune.engine.folder import EmbedOptions, EmbedReport, embed_slides, features_folder
from modaltune.engine.ledger_schema import LEDGER_NAME
from modaltune.errors import InputError

# Imported where they are needed: torch takes seconds, in which decoders can start already, and what
# only a model needs takes one more.
if TYPE_CHECKING:
    from modaltune.checkpoint import Run
    from modaltune.cohort_embeddings import CohortEmbeddings
    from modaltune.engine.encoders.runtime import TileEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedRequest:
    """What `modaltune embed` was asked for; see its help."""

    slides: tuple[Path, ...] = ()
    manifest: Path | None = None
    out: Path = Path("modaltune-out")
    root: Path | None = None
    tile_encoder: str | None = None
    tile_encoder_weights: Path | None = None
    allow_download: bool = False
    trust_remote_code: str | None = None
    mpp: float | None = None
    tile_px: int | None = None
    base_mpp: float | None = None
    min_foreground: float = 0.95
    tissue: Literal["lab", "lab-mean", "otsu", "hsv"] = "lab"
    reader: str | None = None
    overlays: bool = True
    workers: int | None = None
    half_scale_jpeg: bool = False
    bad_share: float = 0.01
    decode_timeout_s: float = 120.0
    model: Path | None = None
    genes: Path | None = None
    clinical: Path | None = None
    device: str = "cpu"
    new_recipe: bool = False
    runtime: str = "auto"
    runtime_fallback: bool = False


def embed_request(
    request: EmbedRequest, console: Console | None = None
) -> tuple[EmbedReport, dict[str, Any]]:
    """Do the main job.

    Args:
        request: What to do.
        console: Where progress is drawn; None for silence.

    Returns:
        The outcome of every slide, and a summary as JSON values, which is also written to
        `OUT/report.json`.

    Raises:
        InputError: Something asked for breaks a rule; that is found before the first slide is
            opened, and nothing has been written then. Slides that fail on the way are in the
            report instead. A full disk ends the run as one.
    """
    items = _items(request)
    run = _run(request)
    tables = _tables(request)
    name, options = _settings(request, run)
    with contextlib.ExitStack() as stack:
        decoder = None
        if not (request.out / LEDGER_NAME).exists():  # else there may be nothing to decode
            decode = options.stream_options().decode
            decoder = stack.enter_context(TileDecoder(decode, is_warmed_up=True))
        encoder = _encoder(name, request, options)
        if run is not None:
            _check_encoder(run, encoder, request)
            _check_tables(run, items, tables)
        report = _embed_with_progress(items, encoder, request, options, console, decoder)
    folders = (features_folder(request.out, encoder), request.out / "overlays")
    written = [str(folder) for folder in folders if folder.is_dir()]
    summary = report.to_dict()
    summary["runtime"] = encoder.settings()
    if run is not None:
        from modaltune.cases import Cohort
        from modaltune.cohort_embeddings import embed_cohort, write_embeddings

        embeddings = embed_cohort(run, Cohort(_features_by_case(report), *tables))
        path = write_embeddings(request.out / "embeddings.parquet", run, embeddings)
        written.append(str(path))
        summary["cases"] = len(embeddings.cases)
        summary["cases_by_modalities"] = _count_modalities(embeddings)
        summary["alike_share"] = embeddings.alike_share
        summary["random_backbone"] = run.model.config.random_backbone
    summary["written"] = written
    write_json_atomic(request.out / "report.json", summary)
    return report, summary


def _encoder(name: str, request: EmbedRequest, options: EmbedOptions) -> TileEncoder:
    from modaltune.engine.encoders import load_encoder

    return load_encoder(
        name,
        weights=request.tile_encoder_weights,
        allow_download=request.allow_download,
        trust_remote_code=request.trust_remote_code,
        device=request.device,
        runtime=request.runtime,
        tile_px=options.tile_px,
        runtime_fallback=request.runtime_fallback,
    )


def _items(request: EmbedRequest) -> list[SlideItem]:
    if request.manifest is not None:
        return read_manifest(request.manifest, root=request.root, base_mpp=request.base_mpp)
    return items_from_paths(request.slides, request.base_mpp)


def _run(request: EmbedRequest) -> Run | None:
    if request.model is None:
        return None
    from modaltune.checkpoint import load_run

    return load_run(request.model, device=request.device)


def _tables(request: EmbedRequest) -> tuple[Any, Any]:
    """Read expression and clinical tables before the first slide is opened."""
    expression = clinical = None
    if request.genes is not None:
        from modaltune.omics import read_expression

        expression = read_expression(request.genes)
    if request.clinical is not None:
        from modaltune.clinical import read_clinical

        clinical = read_clinical(request.clinical)
    return expression, clinical


def _check_encoder(run: Run, encoder: TileEncoder, request: EmbedRequest) -> None:
    """Refuse a tile encoder whose features the model would refuse, before it encodes anything."""
    recipe = run.preprocessing.tiles
    got = {"width": encoder.width, "encoder_sha256": encoder.weights_sha256}
    for name, value in got.items():
        want = getattr(recipe, name, None)
        if want is not None and want != value:
            raise InputError(
                f"tile encoder of model {request.model} must have {name} {want}, got {value} from "
                f"{encoder.name}; give the tile encoder and the weights that it was tuned on"
            )


def _check_tables(run: Run, items: list[SlideItem], tables: tuple[Any, Any]) -> None:
    """Refuse tables that the model can't use or that know none of the slides' cases."""
    from modaltune.cases import Cohort

    cases = {item.case_id for item in items}
    cohort = Cohort({}, *tables)
    fitted = run.preprocessing
    for option, table, convert in (
        ("--genes", cohort.expression, fitted.gene_values),
        ("--clinical", cohort.clinical, fitted.clinical_values),
    ):
        rows = cohort.rows(table, cohort.case_ids)
        if rows is None:
            continue
        missing = sorted(cases - set(rows.index))
        if len(missing) == len(cases):
            raise InputError(
                f"{option} must have rows of the slides' cases ({_few(missing)}), got "
                f"{_few(list(rows.index))}; name the cases in the manifest's column case_id"
            )
        if missing:
            logger.warning(
                "%d of %d cases have no row in %s: %s",
                len(missing), len(cases), option, _few(missing),
            )  # fmt: skip
        convert(rows)


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _features_by_case(report: EmbedReport) -> dict[str, tuple[Path, ...]]:
    """Return the feature files of every case; a slide that failed is missed aloud."""
    slides: dict[str, tuple[Path, ...]] = {}
    for outcome in report.outcomes:
        if outcome.features is not None:
            slides[outcome.case_id] = (*slides.get(outcome.case_id, ()), outcome.features)
        else:
            logger.warning(
                "case %s is embedded without slide %s, which failed; mend it and run again",
                outcome.case_id,
                outcome.slide_id,
            )
    return slides


def _count_modalities(embeddings: CohortEmbeddings) -> dict[str, int]:
    """Count cases by what went into their embedding, such as "slide + genes"."""
    from modaltune.cohort_embeddings import case_modalities

    return dict(Counter(" + ".join(case_modalities(case)) for case in embeddings.cases))


def _settings(request: EmbedRequest, run: Run | None) -> tuple[str, EmbedOptions]:
    """Return tile encoder and tiling; what is not asked for follows the model."""
    recipe = None if run is None else run.preprocessing.tiles
    encoder = request.tile_encoder
    if encoder is not None and not is_dynamic(encoder):
        encoder = get_spec(encoder).name
    name = encoder or (recipe and recipe.encoder) or DEFAULT_ENCODER
    if recipe is not None:
        for option, asked, tuned in (
            ("--tile-encoder", encoder, recipe.encoder),
            ("--mpp", request.mpp, recipe.target_mpp),
            ("--tile-px", request.tile_px, recipe.tile_px),
        ):
            if asked is not None and tuned is not None and asked != tuned:
                raise InputError(
                    f"{option} must be {tuned}, as the model {request.model} was tuned on, got "
                    f"{asked}; leave it out"
                )
    tuned_mpp = None if recipe is None else recipe.target_mpp
    tuned_px = None if recipe is None else recipe.tile_px
    mpp = next(v for v in (request.mpp, tuned_mpp, 0.5) if v is not None)
    tile_px = next(v for v in (request.tile_px, tuned_px, 256) if v is not None)
    return name, EmbedOptions(
        mpp=mpp,
        tile_px=tile_px,
        min_foreground=request.min_foreground,
        tissue=request.tissue,
        reader=request.reader,
        overlays=request.overlays,
        workers=request.workers,
        half_scale_jpeg=request.half_scale_jpeg,
        bad_share=request.bad_share,
        decode_timeout_s=request.decode_timeout_s,
    )


def _embed_with_progress(
    items: list[SlideItem],
    encoder: TileEncoder,
    request: EmbedRequest,
    options: EmbedOptions,
    console: Console | None,
    decoder: TileDecoder | None,
) -> EmbedReport:
    bars = None if console is None else _progress(console)
    with bars or contextlib.nullcontext():
        on_tiles: Callable[[int], None] | None = None
        on_slide: Callable[[Any], None] | None = None
        if bars is not None:
            total = bars.add_task("slides", total=len(items))
            tiles = bars.add_task("tiles", total=None)

            def on_tiles(done: int) -> None:
                bars.update(tiles, completed=done)

            def on_slide(outcome: Any) -> None:
                bars.advance(total)

        return embed_slides(
            items,
            encoder,
            request.out,
            options,
            new_recipe=request.new_recipe,
            on_tiles=on_tiles,
            on_slide=on_slide,
            decoder=decoder,
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
