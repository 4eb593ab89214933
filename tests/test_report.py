"""The report as a file: complete, safe, self-contained, and honest about what it lacks."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modaltune.demo_study import VariantResult
from modaltune.report import ReportData, write_report

CASES = 24
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find: elements, their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def ids(self) -> list[str]:
        return [i for _, attributes in self.elements if (i := attributes.get("id"))]


def variant(values: np.ndarray, accuracy: float, missing: int = 0) -> VariantResult:
    return VariantResult(
        1 / (1 + np.exp(-values)),
        values,
        (accuracy, accuracy - 0.1, accuracy + 0.05),
        (0.7, 0.6, 0.8),
        missing,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    tmp_path = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    morphology, activity = rng.uniform(-1.7, 1.7, (2, CASES))
    classes = (morphology + activity > 0).astype(np.int64)
    ids = [f"SYN-{i:03d}" for i in range(CASES)]
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    for case in ids:
        Image.new("RGB", (400, 400), (200, 90, 140)).save(overlays / f"{case}-A.png")
    has_slide = [i > 0 for i in range(CASES)]
    records = [
        {
            "case_id": case,
            "discohesive_share": 0.5 + morphology[i] / 3.5,
            "pathway_activity": activity[i],
            "label_changed": False,
            "slides": {f"{case}-A": [{"x": 0, "y": 0, "discohesive": i / CASES}]}
            if has_slide[i]
            else {},
        }
        for i, case in enumerate(ids)
    ]
    best = {"image_only": 0.7, "genes_only": 0.7, "image_and_genes": 0.95, "of": "a large cohort"}
    return ReportData(
        title="ModalTune demo",
        notice="SYNTHETIC: drawn slides. RANDOM SLIDE ENCODER: not pretrained.",
        random_backbone=True,
        seed=17,
        settings={"folds": 4, "training": {"lr": 0.001}},
        cohort_root=tmp_path / "cohort",
        features_folder=tmp_path / "features",
        overlays_folder=overlays,
        case_ids=ids,
        modalities={"slide": has_slide, "genes": [True] * CASES, "clinical": [True] * CASES},
        classes=classes,
        durations=np.exp(3 - morphology - activity),
        events=(np.arange(CASES) % 4 > 0).astype(float),
        variants={
            "image + genes": variant(morphology + activity, 0.94),
            "image only": variant(morphology, 0.71, missing=1),
            "genes only": variant(activity, 0.66),
        },
        embedding=rng.normal(size=(CASES, 8)),
        truth={
            "image": {"latent_max": 1.75},
            "genes": {"planted_pathways": ["SYNTHETIC_ONE"]},
            "subtype": {"balanced_accuracy_of_the_best_rule": best},
            "cases": records,
        },
        stages_s={"open": 0.0, "tuning": 120.25, "slides": 60.0},
        elapsed_s=181.4,
        embed_report={
            "encoder": "efficientnet-lite0",
            "settings": {"tile_px": 256},
            "slides": [
                {"slide_id": f"{c}-A", "case_id": c, "status": "done", "tiles": 100}
                for c in ids[1:]
            ],
            "stages_s": {"encode": 50.0},
        },
    )


def written(data: ReportData, tmp_path: Path) -> tuple[str, Page]:
    path = tmp_path / "out" / "report.html"
    assert write_report(path, data) == path
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def usual(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The report of `data` as it is, written once."""
    return written(data, tmp_path_factory.mktemp("report"))


def test_every_section_and_picture_is_there(usual: tuple[str, Page]) -> None:
    text, page = usual
    assert not page.open, "elements left open"
    sections = ["headline", "planted", "slides", "predictions", "cohort", "own-data"]
    found = page.ids()
    assert [i for i in found if i in sections] == sections
    assert {"time", "settings"} <= set(found)
    assert len(found) == len(set(found))
    assert sum(tag == "svg" for tag, _ in page.elements) == 6
    assert "not drawn" not in text
    assert "nan" not in page.text.lower().split()


def test_figures_are_said_in_numbers_and_words(usual: tuple[str, Page]) -> None:
    text = usual[1].text
    for said in (
        "SYNTHETIC",
        "RANDOM SLIDE ENCODER",
        "balanced accuracy of 0.94; on image only, the better one alone, with 0.71: ahead by 0.23",
        "+0.23",
        "95 % CI 0.84–0.99",
        "1 (image only)",
        "seed 17",
        "0.95 on both, 0.70 on the image and 0.70 on the genes",
        "120.2 s",
        "2,300",
        "SYNTHETIC_ONE",
        "training / lr",
        "6 (25 %)",
        "modaltune embed --manifest cohort.csv --out cohort",
    ):
        assert said in text, said


def test_being_behind_is_said_too(data: ReportData, tmp_path: Path) -> None:
    worse = {**data.variants, "image + genes": variant(np.arange(CASES) / 9, 0.6)}
    text = written(dataclasses.replace(data, variants=worse), tmp_path)[1].text
    assert "behind by 0.11" in text
    assert "\N{MINUS SIGN}0.11" in text


def test_nothing_is_fetched(usual: tuple[str, Page]) -> None:
    text, page = usual
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/jpeg;base64,"))


def test_pictures_have_words_and_pages_stay_small(usual: tuple[str, Page]) -> None:
    text, page = usual
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 3  # overlays only: the slides themselves are not there
    assert all(image["alt"] for image in images)
    framed = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(framed) == 6
    assert all(a["aria-label"] for a in framed)
    assert len(text) < 4_000_000


def test_text_is_escaped_everywhere(data: ReportData, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>$title'
    truth = {**data.truth, "genes": {"planted_pathways": [evil]}}
    text, page = written(
        dataclasses.replace(
            data,
            title=evil,
            notice=evil,
            settings={evil: evil},
            truth=truth,
            variants={f"{name}{evil}": found for name, found in data.variants.items()},
            stages_s={evil: 1.0},
            embed_report={**data.embed_report, "encoder": evil},
        ),
        tmp_path,
    )
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(evil) >= 6
    # The badges do not depend on the wording of the notice.
    assert "RANDOM SLIDE ENCODER" in page.text


def without(data: ReportData, **changes: Any) -> ReportData:
    return dataclasses.replace(data, **changes)


def test_one_class_only(data: ReportData, tmp_path: Path) -> None:
    text = written(without(data, classes=np.ones(CASES, np.int64)), tmp_path)[1].text
    assert "Subtype: ROC: not drawn, all cases are of one class" in text


def test_unknown_risk_and_scores(data: ReportData, tmp_path: Path) -> None:
    nothing = (float("nan"),) * 3
    blank = {
        name: dataclasses.replace(
            found, risk=np.full(CASES, np.nan), c_index=nothing, balanced_accuracy=nothing
        )
        for name, found in data.variants.items()
    }
    text = written(without(data, variants=blank), tmp_path)[1].text
    assert "Survival by predicted risk: not drawn, fewer than two cases" in text
    assert "Balanced accuracy is not available" in text


def test_some_unknown_risks(data: ReportData, tmp_path: Path) -> None:
    both = data.variants["image + genes"]
    risk = np.where(np.arange(CASES) < 4, np.nan, both.risk)
    some = {**data.variants, "image + genes": dataclasses.replace(both, risk=risk)}
    assert f"{CASES - 4} cases halved" in written(without(data, variants=some), tmp_path)[1].text


def test_no_slides_no_truth_no_risk(data: ReportData, tmp_path: Path) -> None:
    both = data.variants["image + genes"]
    unknown = dataclasses.replace(both, risk=np.full(CASES, np.nan))
    bare = without(
        data,
        truth={},
        overlays_folder=None,
        variants={**data.variants, "image + genes": unknown},
        modalities={**data.modalities, "slide": [False] * CASES},
        embed_report={},
        stages_s={},
    )
    text = written(bare, tmp_path)[1].text
    for said in (
        "What was planted: not drawn, no case has known planted values",
        "no slide and no overlay was found",
        "What the model says: not drawn, fewer than three cases have a probability and a risk",
    ):
        assert said in text, said
    assert re.search(rf"without slide\s+{CASES}\b", text)


def test_a_failure_leaves_the_old_report(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def fail(self: Path, *args: Any, **kwargs: Any) -> int:
        self.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, data)
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert not list(tmp_path.glob(".report*"))
