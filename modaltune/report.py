"""The demo's report: one self-contained HTML file with its pictures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modaltune import plots
from modaltune.engine.atomic import atomic_path
from modaltune.report_html import (
    MISSING,
    drawn,
    escape,
    flatten,
    interval,
    note,
    number,
    plot,
    section,
    stage_rows,
    table,
)
from modaltune.report_slides import Picture, example_pictures

if TYPE_CHECKING:
    from modaltune.demo_study import VariantResult

Floats = npt.NDArray[np.float64]

OWN_DATA = """\
# what is here, and how to get the rest
modaltune doctor
# size, levels, resolution, reader
modaltune slides info slide.svs
# tile features, and a picture of mask and tiles
modaltune embed *.svs --out features
# the same for a cohort, and embeddings per patient
modaltune embed --manifest cohort.csv --out cohort \\
  --model run --genes expression.csv --clinical clinical.csv"""


@dataclass(frozen=True)
class ReportData:
    """All that the report shows; every array is in the order of `case_ids`.

    Attributes:
        title: Of the page.
        notice: What the figures are not; stands above everything.
        random_backbone: The slide encoder is random.
        seed: Of cohort, folds and training.
        settings: JSON values of model, training and folds.
        cohort_root: Folder with `slides/`.
        features_folder: Where the feature files lie.
        overlays_folder: Of `<slide>.png`; None where there are none.
        case_ids: Every labelled case.
        modalities: "slide", "genes", "clinical" -> present, per case.
        classes: `[n]` 0 or 1.
        durations: `[n]` months.
        events: `[n]` 1 where seen, 0 where censored.
        variants: Results by choice of inputs; the first one has all of them.
        embedding: `[n, D]` of the final model.
        truth: What was planted (`truth.json`).
        stages_s: Seconds per stage.
        elapsed_s: Seconds in all.
        embed_report: `EmbedReport.to_dict()`.
    """

    title: str
    notice: str
    random_backbone: bool
    seed: int
    settings: dict[str, Any]
    cohort_root: Path
    features_folder: Path
    overlays_folder: Path | None
    case_ids: list[str]
    modalities: dict[str, list[bool]]
    classes: npt.NDArray[np.int64]
    durations: Floats
    events: Floats
    variants: Mapping[str, VariantResult]
    embedding: npt.NDArray[Any]
    truth: dict[str, Any]
    stages_s: dict[str, float]
    elapsed_s: float
    embed_report: dict[str, Any]

    @property
    def together(self) -> tuple[str, VariantResult]:
        """The choice of inputs that has all of them, and its results."""
        return next(iter(self.variants.items()))


def write_report(path: Path, data: ReportData) -> Path:
    """Write the report, whole or not at all.

    Pictures that the data cannot carry (one class only, no risk) are replaced by the reason.

    Returns:
        `path`.
    """
    sections = (_headline, _planted, _slides, _predictions, _cohort, _own_data)
    template = resources.files("modaltune").joinpath("templates", "report.html")
    text = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(data.title),
        notice=_notice(data),
        seed=data.seed,
        body="\n".join(write(data) for write in sections),
    )
    with atomic_path(path) as temp:
        temp.write_text(text, encoding="utf-8")
    return path


def _notice(data: ReportData) -> str:
    """Return the notice with its key words as badges; they stand there even if it lacks them."""
    text = escape(data.notice)
    badges = ["SYNTHETIC"] if data.truth else []
    badges += ["RANDOM SLIDE ENCODER"] if data.random_backbone else []
    for words in badges:
        badge = f'<strong class="badge">{words}</strong>'
        named = f"{words}: "
        text = text.replace(named, f"{badge} ", 1) if named in text else f"{badge} {text}"
    return text


def _headline(data: ReportData) -> str:
    cards = []
    for i, (name, found) in enumerate(data.variants.items()):
        low, high = found.balanced_accuracy[1:]
        span = f"95 % CI {number(low)}–{number(high)}"
        cards.append(_score(i, name, number(found.balanced_accuracy[0]), span))
    margin, words = _margin(data)
    cards.append(_score(3, "ahead of the better one alone", margin, "balanced accuracy"))
    plots_ = []
    for key, label in (("balanced_accuracy", "balanced accuracy"), ("c_index", "c-index")):
        values = {name: getattr(found, key) for name, found in data.variants.items()}
        alt = "; ".join(f"{name} {interval(v)}" for name, v in values.items())
        svg = plots.metric_bars(f"bars-{key}", values, f"{label}, out of fold")
        title = "Subtype" if key == "balanced_accuracy" else "Survival"
        caption = (
            f"{label.capitalize()} over all {len(data.case_ids)} cases, each predicted by models "
            "that did not see it; lines are 95 % intervals over patients."
        )
        plots_.append(plot(title, svg, f"Bars of {label}: {alt}.", caption + _prior_note(data)))
    return (
        f'<header><h1>{escape(data.title)}</h1><p class="sub">{len(data.case_ids)} synthetic '
        f"cases, seed {data.seed}, {data.elapsed_s:.0f} s from drawing slides to this page</p>"
        f'</header>\n<section id="headline">\n<p class="lead">{escape(words)}</p>\n'
        f'<div class="grid scores">{"".join(cards)}</div>\n'
        f'<div class="grid">{"".join(plots_)}</div>\n</section>'
    )


def _score(mark: int, label: str, value: str, note: str) -> str:
    return (
        f'<div class="card score s{mark % 4}"><span>{escape(label)}</span>'
        f"<b>{value}</b><span>{note}</span></div>"
    )


def _margin(data: ReportData) -> tuple[str, str]:
    """Return the margin as a signed number, and in words with the c-index beside it."""
    name, both = data.together
    alone = {n: v.balanced_accuracy[0] for n, v in data.variants.items() if n != name}
    known = {n: value for n, value in alone.items() if np.isfinite(value)}
    if not known or not np.isfinite(both.balanced_accuracy[0]):
        return MISSING, "Balanced accuracy is not available, so the inputs cannot be compared."
    better = max(known, key=lambda n: known[n])
    margin = both.balanced_accuracy[0] - known[better]
    verdict = "ahead by" if margin >= 0 else "behind by"
    words = (
        f"Tuned on {name.replace('+', 'and')}, the adapter tells the subtype with a balanced "
        f"accuracy of {both.balanced_accuracy[0]:.2f}; on {better}, the better one alone, with "
        f"{known[better]:.2f}: {verdict} {abs(margin):.2f}."
    )
    risks = {n: v.c_index[0] for n, v in data.variants.items() if np.isfinite(v.c_index[0])}
    if name in risks:
        others = ", ".join(f"{number(v)} on {n}" for n, v in risks.items() if n != name)
        words += f" The c-index of its risk is {risks[name]:.2f}" + (f" ({others})." * bool(others))
    return f"{margin:+.2f}".replace("-", "\N{MINUS SIGN}"), words


def _prior_note(data: ReportData) -> str:
    lacking = [f"{v.unpredictable} ({n})" for n, v in data.variants.items() if v.unpredictable]
    if not lacking:
        return ""
    return f" Cases without their only input count, at the training prior: {', '.join(lacking)}."


def _planted(data: ReportData) -> str:
    planting = _mapping(data.truth, "subtype")
    best = _mapping(planting, "balanced_accuracy_of_the_best_rule")
    words = [
        "Each case has a share of discohesive growth, drawn into its slides, and an activity of a "
        "few pathways, written into its genes. The subtype is which side of the dashed line a case "
        "lies on, so it takes both: along either axis alone the classes overlap, as the edges of "
        "the picture show."
    ]
    if best:
        words.append(
            f"The best rule there is would reach {number(best.get('image_and_genes'))} on both, "
            f"{number(best.get('image_only'))} on the image and {number(best.get('genes_only'))} "
            f"on the genes alone ({best.get('of', 'expected')}). Risk follows both and, slightly, "
            "age."
        )
    points, changed = _points(data)
    errors = int(points.is_error.sum())
    if errors:
        words.append(
            f"Rings: {errors} of {len(points.share)} cases that {data.together[0]} got wrong out "
            f"of fold; {changed} of them had the label changed on purpose, which no model can know."
        )
    prose = "".join(f"<p>{escape(text)}</p>" for text in words)
    names = _mapping(data.truth, "genes").get("planted_pathways", [])
    if isinstance(names, list) and names:
        prose += "<p>Planted pathways: " + ", ".join(f"<code>{escape(n)}</code>" for n in names)
        prose += ".</p>"
    picture = drawn(
        "What was planted",
        lambda: plots.planted_scatter("planted", points),
        "Scatter of planted morphology share and pathway activity; the classes lie on either side "
        f"of a falling line and overlap along each axis alone; {errors} wrong predictions ringed.",
        "Every case by what was planted in it; edges: the classes along either axis alone.",
    )
    both = data.together[1]
    said = drawn(
        "What the model says",
        lambda: plots.prediction_map("said", both.probability, both.risk, data.classes),
        "Scatter of out-of-fold probability of class 1 and rank of risk, coloured by true class.",
        f"Each case as models of {data.together[0]} that did not see it judge it; right of the "
        "dashed line they say class 1.",
    )
    body = f'<div class="grid">{picture}{said}</div>'
    return section("planted", "What was planted, and why neither input suffices", prose, body)


def _points(data: ReportData) -> tuple[plots.PlantedPoints, int]:
    """Return what was planted, and how many of the errors had their label changed."""
    records = {r.get("case_id"): r for r in data.truth.get("cases", []) if isinstance(r, dict)}
    keys = ("discohesive_share", "pathway_activity", "label_changed")
    values = np.array(
        [[float(records.get(c, {}).get(key, np.nan)) for key in keys] for c in data.case_ids]
    ).reshape(-1, 3)
    kept = np.isfinite(values[:, :2]).all(axis=1)
    complete = np.array(data.modalities["slide"]) & np.array(data.modalities["genes"])
    wrong = (data.together[1].probability > 0.5) != (data.classes == 1)
    latent_max = _mapping(data.truth, "image").get("latent_max")
    points = plots.PlantedPoints(
        values[kept, 0],
        values[kept, 1],
        data.classes[kept],
        wrong[kept],
        complete[kept],
        None if latent_max is None else 2 * float(latent_max),
    )
    return points, int((wrong & kept & (values[:, 2] == 1)).sum())


def _slides(data: ReportData) -> str:
    pictures = example_pictures(data.truth, data.cohort_root, data.overlays_folder)
    prose = (
        "<p>Drawn slides of both morphologies: glands around a lumen, and discohesive growth in "
        "single files. Full colour under a green outline: a kept tile; veiled: what was dropped. "
        "With each, one of its tiles, as the tile encoder sees it.</p>"
    )
    if not pictures:
        return section("slides", "Slides", prose, note("no slide and no overlay was found"))
    return section(
        "slides",
        "Slides",
        prose,
        f'<div class="grid strip">{"".join(map(_picture, pictures))}</div>',
    )


def _picture(picture: Picture) -> str:
    return (
        f'<figure class="card"><img src="{picture.uri}" alt="{escape(picture.alt)}" '
        f'width="{picture.width}" height="{picture.height}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _predictions(data: ReportData) -> str:
    probabilities = {name: found.probability for name, found in data.variants.items()}
    name, both = data.together
    roc = drawn(
        "Subtype: ROC",
        lambda: plots.roc_curves("roc", data.classes, probabilities),
        "ROC curves of " + ", ".join(probabilities) + "; the legend gives the areas under them.",
        "Out-of-fold probability of class 1 over all cases; the straight line is chance.",
    )
    try:
        halves = plots.split_by_risk(data.durations, data.events, both.risk)
    except plots.NotDrawableError as reason:
        survival = note(f"Survival by predicted risk: not drawn, {reason}")
    else:
        known = int((halves.high | halves.low).sum())
        survival = plot(
            "Survival by predicted risk",
            plots.survival_curves("survival", data.durations, data.events, halves),
            f"Kaplan-Meier curves of the halves of lower and higher predicted risk; log-rank "
            f"{plots.p_text(halves.p_value)}.",
            f"{known} cases halved at the median out-of-fold risk of {name}; log-rank "
            f"{plots.p_text(halves.p_value)}. Ticks are censored cases, bands 95 % intervals.",
        )
    pictures = f'<div class="grid">{roc}{survival}</div>'
    return section("predictions", "Predictions out of fold", "", pictures)


def _cohort(data: ReportData) -> str:
    facts = f'<div class="card"><h3>Cohort</h3>{table(_facts(data))}</div>'
    inside = stage_rows(data.embed_report.get("stages_s", {}))
    times = (
        f'<div class="card" id="time"><h3>Time</h3><table>'
        f"{stage_rows(data.stages_s, data.elapsed_s)}</table>"
        + (f"<h3>Slides, all processes together</h3><table>{inside}</table>" if inside else "")
        + "</div>"
    )
    settings = {"study": data.settings, "slides to features": data.embed_report.get("settings", {})}
    flat = {
        key: json.dumps(value) if isinstance(value, (list, dict)) else str(value)
        for key, value in flatten(settings)
    }
    details = (
        f'<details id="settings" class="card"><summary>Settings ({len(flat)})</summary>'
        f"{table(flat)}</details>"
    )
    return section(
        "cohort",
        "Cohort, time and settings",
        "",
        f'<div class="grid">{facts}{times}</div>{details}',
    )


def _facts(data: ReportData) -> dict[str, str]:
    slides = data.embed_report.get("slides", [])
    tiles = sum(int(slide.get("tiles", 0)) for slide in slides)
    owners = [slide.get("case_id") for slide in slides]
    cases, censored = len(data.case_ids), int((data.events == 0).sum())
    counts = ", ".join(f"class {c}: {(data.classes == c).sum()}" for c in np.unique(data.classes))
    share = f" ({100 * censored / cases:.0f} %)" if cases else ""
    median = number(np.median(data.durations), 1) if cases else MISSING
    missing = {
        f"without {'clinical inputs' if name == 'clinical' else name}": str(
            len(present) - sum(present)
        )
        for name, present in data.modalities.items()
    }
    return {
        "cases": f"{cases} ({counts})",
        "slides": str(len(slides)),
        "cases with two slides or more": str(sum(owners.count(o) > 1 for o in set(owners))),
        "tiles": f"{tiles:,}",
        **missing,
        "censored": f"{censored}{share}",
        "median time under observation": f"{median} months",
        "tile encoder": str(data.embed_report.get("encoder", MISSING)),
        "slide encoder": "LongNet, random weights" if data.random_backbone else "pretrained",
        "embedding": f"{data.embedding.shape[1]} numbers per case and prompt",
    }


def _own_data(data: ReportData) -> str:
    prose = (
        f"<pre><code>{escape(OWN_DATA)}</code></pre>"
        "<p>Columns of <code>cohort.csv</code>: slide, case_id, mpp. A slide without a resolution "
        "is never guessed at: give <code>--base-mpp</code> or the column mpp. A case that lacks an "
        "input stays; its tokens are masked. The model of this demo lies in <code>run/</code> "
        "beside this file and only knows drawn tissue.</p>"
    )
    return section("own-data", "On your own data", prose, "")


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = values.get(key)
    return inner if isinstance(inner, Mapping) else {}
