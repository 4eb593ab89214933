"""`modaltune status` and `modaltune retry`: what they show, say and refuse."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from modaltune.cli import app
from modaltune.console_tables import status_tables
from modaltune.engine.cohort import SlideItem
from modaltune.engine.ledger import Lease, LeaseTerms, Ledger
from modaltune.engine.ledger_report import read_status
from modaltune.engine.ledger_schema import connect
from modaltune.engine.pyramid import write_pyramid
from modaltune.testing_features import SMALL_RECIPE, small_features


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    """Everything printed, on one line."""
    return re.sub(r"\s+", " ", result.output)


def opened(folder: Path, **terms: int) -> Ledger:
    """Five slides, s0 the heaviest."""
    items = [SlideItem(folder / f"s{i}.svs", f"s{i}", f"case{i}") for i in range(5)]
    return Ledger.open(
        folder / "out", SMALL_RECIPE, items, features="features_small",
        terms=LeaseTerms(**terms), weigh=lambda item: -float(item.slide_id[1:]),
    )  # fmt: skip


def claimed(ledger: Ledger) -> Lease:
    lease = ledger.claim()
    assert lease is not None
    return lease


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """s0 quarantined, s1 failed once, s2 done, s3 in work, s4 waiting."""
    with opened(tmp_path, max_attempts=1) as ledger:
        ledger.commit_failed(claimed(ledger), "slide s0 must be whole, got [red]half")
    with opened(tmp_path) as ledger:
        ledger.commit_failed(claimed(ledger), "slide s1 must be a slide")
        done = claimed(ledger)
        small_features(done.features, done.item, tiles=7)
        ledger.commit_done(done)
        claimed(ledger)
        yield tmp_path / "out"


def test_status_shows_counts_workers_and_reasons(out: Path) -> None:
    result = run("status", out)
    assert result.exit_code == 0, result.output
    text = said(result)
    for words in (
        "features_small", "pending │ 1", "running │ 1", "done │ 1", "failed │ 1", "quarantined │ 1",
        "tiles │ 7", "not known yet", "min_foreground │ 0.5", socket.gethostname(),
        str(os.getpid()), "alive", "slide s0 must be whole, got [red]half", "must be a slide",
    ):  # fmt: skip
        assert words in text, words


def test_status_for_machines(out: Path) -> None:
    result = run("status", out, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ledger"] == str(out / "ledger.sqlite")
    (one,) = found["sets"]
    assert one["counts"] == {
        "pending": 1, "running": 1, "done": 1, "empty": 0, "failed": 1, "quarantined": 1,
    }  # fmt: skip
    assert (one["features"], one["tiles"]) == ("features_small", 7)
    assert one["recipe"] == SMALL_RECIPE
    (lease,) = one["running"]
    assert (lease["slide_id"], lease["pid"], lease["state"]) == ("s3", os.getpid(), "alive")
    assert 0 <= lease["silent_s"] <= lease["age_s"] < 600
    assert [(p["slide_id"], p["status"], p["attempts"]) for p in one["problems"]] == [
        ("s0", "quarantined", 1), ("s1", "failed", 1),
    ]  # fmt: skip


def test_the_rate_is_that_of_the_last_hour_of_work(out: Path) -> None:
    finished = [1000.0, 50_000.0, 50_600.0, 51_200.0]
    with contextlib.closing(connect(out)) as db:
        for row, when in enumerate(finished, start=1):
            db.execute("UPDATE slides SET finished_at = ? WHERE id = ?", (when, row))
    (one,) = read_status(out)
    assert one.slides_per_h == pytest.approx(6.0)  # 2 spans of 600 s; the first slide was long ago


def test_long_lists_are_cut_in_the_table_only(out: Path) -> None:
    (one,) = read_status(out)
    tables = list(status_tables([one], most=1))
    assert tables[-1].row_count == 2
    assert list(tables[-1].columns[0].cells)[-1] == "and 1 more, all with --json"


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], ["s0", "s1"]),
        (["--failed"], ["s1"]),
        (["--quarantined"], ["s0"]),
        (["--failed", "--quarantined"], ["s0", "s1"]),
        (["--slide", "s2", "--slide", "s0"], ["s0", "s2"]),
    ],
)
def test_retry_lets_slides_wait_again(out: Path, options: list[str], ids: list[str]) -> None:
    result = run("retry", out, *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"retried": ids}
    (one,) = read_status(out)
    assert not {row.slide_id for row in one.problems} & set(ids)
    assert one.counts["pending"] == 1 + len(ids)


def test_retry_says_what_is_next(out: Path) -> None:
    text = said(run("retry", out))
    assert "s0 is pending s1 is pending" in text
    assert f"2 slides will be tried again: run `modaltune embed` with --out {out}" in text
    assert "no slide has failed: nothing to try again" in said(run("retry", out))


def test_retry_refuses_what_is_unknown_or_in_work(out: Path) -> None:
    unknown = run("retry", out, "--slide", "s22")
    assert unknown.exit_code == 1
    assert "--slide must be a slide of the ledger, got 's22'; did you mean s2?" in said(unknown)
    busy = run("retry", out, "--slide", "s3")
    assert busy.exit_code == 1
    assert "must not be in work, got s3; wait, or end the process" in said(busy)
    assert run("retry", out, "--slide", "s0", "--failed").exit_code == 2
    (one,) = read_status(out)
    assert one.counts["quarantined"] == 1


def test_folders_without_a_ledger(tmp_path: Path) -> None:
    for command in ("status", "retry"):
        result = run(command, tmp_path)
        assert result.exit_code == 1
        assert "must hold ledger.sqlite, got none; name the --out folder" in said(result)


def test_embed_says_what_failed_and_takes_a_new_recipe(tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    rgb = np.random.default_rng(1).integers(100, 190, (512, 512, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    good = write_pyramid(tmp_path / "good.tiff", rgb, mpp=0.5)
    words = ["embed", tmp_path / "bad.svs", good, "--out", tmp_path / "out", "--no-overlays"]
    result = run(*words)
    assert result.exit_code == 1
    text = said(result)
    assert "quarantined" in text
    assert "1 of 2 slides could not be embedded" in text
    assert f"`modaltune retry {tmp_path / 'out'}`" in text
    assert "is tried again" in text
    changed = run(*words, "--min-foreground", 0.5)
    assert changed.exit_code == 1
    assert "min_foreground: stored 0.95, asked 0.5" in said(changed)
    assert "--new-recipe" in said(changed)
    made = run(*words, "--min-foreground", 0.5, "--new-recipe", "--json")
    assert json.loads(made.stdout)["counts"]["done"] == 1
