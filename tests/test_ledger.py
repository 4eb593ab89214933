"""The ledger's life: claims, leases, attempts, and what a run finds when it opens one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from modaltune.engine.cohort import SlideItem
from modaltune.engine.errors import InputError, LeaseLostError, LedgerError, RecipeChangedError
from modaltune.engine.ledger import Lease, LeaseTerms, Ledger
from modaltune.engine.ledger_leases import Worker
from modaltune.engine.ledger_work import Claims, settles
from modaltune.engine.own_features import own_header
from modaltune.testing_features import SMALL_RECIPE, small_features

FEATURES = "features_small"


def cohort(folder: Path, count: int = 3) -> list[SlideItem]:
    """Slides s0, s1, ... of rising size."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i in range(count):
        path = folder / f"s{i}.svs"
        path.write_bytes(b"x" * (i + 1))
        items.append(SlideItem(path, f"s{i}", f"case{i}"))
    return items


def opened(out: Path, items: list[SlideItem], **options: object) -> Ledger:
    return Ledger.open(out, SMALL_RECIPE, items, features=FEATURES, **options)  # type: ignore[arg-type]


def claimed(ledger: Ledger) -> Lease:
    lease = ledger.claim()
    assert lease is not None
    return lease


def finish(ledger: Ledger, lease: Lease, tiles: int = 3) -> None:
    small_features(lease.features, lease.item, tiles=tiles)
    ledger.commit_done(lease, timings={"read": 0.5})


def test_heavy_slides_come_first_and_each_is_done_once(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides")
    with opened(tmp_path / "out", items) as ledger:
        order = []
        for lease in iter(ledger.claim, None):
            order.append(lease.item.slide_id)
            assert lease.features == tmp_path / "out" / FEATURES / f"{lease.item.slide_id}.h5"
            finish(ledger, lease, tiles=0 if lease.item.slide_id == "s1" else 2)
        assert order == ["s2", "s1", "s0"]
        assert ledger.counts() == {"done": 2, "empty": 1}
        rows = ledger.rows()
    assert [row.slide_id for row in rows] == ["s0", "s1", "s2"]
    assert [(row.status, row.tiles, row.reason) for row in rows] == [
        ("done", 2, ""), ("empty", 0, "no tissue"), ("done", 2, ""),
    ]  # fmt: skip
    header = own_header(tmp_path / "out" / FEATURES / "s0.h5") or {}
    assert rows[0].payload_sha256 == header["payload_sha256"]
    assert (rows[0].reader, rows[0].timings, rows[0].attempts) == ("test", {"read": 0.5}, 1)
    assert (rows[0].case_id, rows[0].features) == ("case0", f"{FEATURES}/s0.h5")


def test_slides_can_be_weighed_otherwise(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides")
    light_first = {"s0": 3.0, "s1": 2.0, "s2": 1.0}
    with opened(tmp_path / "out", items, weigh=lambda item: light_first[item.slide_id]) as ledger:
        assert [claimed(ledger).item.slide_id for _ in items] == ["s0", "s1", "s2"]


def test_a_run_takes_only_its_own_slides(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides", 6)
    opened(tmp_path / "out", items).close()
    with opened(tmp_path / "out", items[1:3]) as ledger:
        assert [claimed(ledger).item.slide_id for _ in range(2)] == ["s2", "s1"]
        assert ledger.claim() is None
        assert ledger.counts() == {"running": 2}


def test_a_failure_waits_for_the_others_and_is_quarantined_after_three(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides")
    order, seen = [], []
    with opened(tmp_path / "out", items) as ledger:
        for lease in iter(ledger.claim, None):
            order.append((lease.item.slide_id, lease.attempt))
            with settles(ledger, lease, seen.append):
                if lease.item.slide_id == "s2":
                    raise InputError("slide s2 must be whole, got half of it")
                finish(ledger, lease)
        bad = ledger.rows()[2]
    assert order == [("s2", 1), ("s1", 1), ("s0", 1), ("s2", 2), ("s2", 3)]
    assert (bad.status, bad.attempts) == ("quarantined", 3)
    assert bad.reason == "slide s2 must be whole, got half of it"
    assert [row.status for row in seen] == ["failed", "failed", "quarantined"]
    with opened(tmp_path / "out", items) as ledger:
        assert ledger.claim() is None  # also of a later run
        assert ledger.retry() == ["s2"]
        again = claimed(ledger)
        assert (again.item.slide_id, again.attempt) == ("s2", 1)
        assert ledger.rows()[2].reason == ""


def test_faults_that_are_not_the_slides_give_it_back_or_go_up(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides", 1)
    with opened(tmp_path / "out", items) as ledger:
        with pytest.raises(KeyboardInterrupt), settles(ledger, claimed(ledger)):
            raise KeyboardInterrupt
        assert [(row.status, row.attempts) for row in ledger.rows()] == [("pending", 0)]
        with pytest.raises(ZeroDivisionError), settles(ledger, claimed(ledger)):
            raise ZeroDivisionError("a fault of ours")
        (row,) = ledger.rows()
        assert (row.status, row.attempts) == ("failed", 1)
        assert row.reason == "ZeroDivisionError: a fault of ours"


def test_closing_gives_back_what_was_held(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides")
    with opened(tmp_path / "out", items) as ledger:
        claimed(ledger)
        claimed(ledger)
    with opened(tmp_path / "out", items) as ledger:
        assert ledger.counts() == {"pending": 3}
        assert claimed(ledger).attempt == 1


def another_file(items: list[SlideItem], folder: Path, content: bytes) -> SlideItem:
    """A slide of the first one's name in another folder."""
    folder.mkdir()
    (folder / items[0].path.name).write_bytes(content)
    return replace(items[0], path=folder / items[0].path.name)


@pytest.mark.parametrize("tiles", [3, 0])
def test_another_slide_of_the_same_name_is_not_taken_for_finished(
    tmp_path: Path, tiles: int
) -> None:
    """Patients' folders with a slide of one name each, and one --out for all of them."""
    items, out = cohort(tmp_path / "slides", 1), tmp_path / "out"
    with opened(out, items) as ledger:
        lease = claimed(ledger)
        finish(ledger, lease, tiles)
    before = lease.features.read_bytes()
    moved = another_file(items, tmp_path / "moved", items[0].path.read_bytes())
    with opened(out, [moved]) as ledger:
        assert ledger.claim() is None
        assert ledger.rows()[0].path == str(moved.path)
    other = another_file(items, tmp_path / "other", b"another slide")
    message = rf"another size: file of s0: stored {moved.path}, asked {other.path}; .*--new-recipe"
    with pytest.raises(RecipeChangedError, match=message):
        opened(out, [other])
    with opened(out, [moved]) as ledger:
        assert ledger.claim() is None  # nothing was changed
    with opened(out, [other], new_recipe=True) as ledger:
        again = claimed(ledger)
        assert again.item == other
        assert lease.features.read_bytes() == before  # until the new one is whole
        with pytest.raises(RecipeChangedError, match="no process is at work"):
            opened(out, items, new_recipe=True)
        finish(ledger, again)
    with opened(out, [other]) as ledger:
        assert ledger.claim() is None


def test_another_file_in_place_of_a_broken_one_is_tried(tmp_path: Path) -> None:
    items, out = cohort(tmp_path / "slides", 1), tmp_path / "out"
    with opened(out, items, terms=LeaseTerms(max_attempts=1)) as ledger:
        ledger.commit_failed(claimed(ledger), "slide s0 must be whole")
        assert ledger.claim() is None
    with opened(out, [another_file(items, tmp_path / "mended", b"the whole slide")]) as ledger:
        assert claimed(ledger).attempt == 1


def test_two_workers_never_hold_one_slide(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides")
    with opened(tmp_path / "out", items) as one, opened(tmp_path / "out", items) as two:
        first, second = claimed(one), claimed(two)
        assert first.item.slide_id != second.item.slide_id
        assert one.unsettled() == [second.item.slide_id, "s0"]
        assert two.unsettled() == [first.item.slide_id, "s0"]
        third = claimed(one)
        assert one.unsettled() == [second.item.slide_id]
        assert two.claim() is None
        one.commit_failed(third, "not this time")
        assert claimed(two).item.slide_id == third.item.slide_id


def test_a_stream_waits_while_slides_are_in_work_anywhere(tmp_path: Path) -> None:
    """What this process holds may fail and wait again; what others hold, too."""
    items = cohort(tmp_path / "slides", 2)
    with opened(tmp_path / "out", items) as ledger, opened(tmp_path / "out", items) as other:
        theirs = claimed(other)
        claims = Claims(ledger, tmp_path / "overlays", poll_s=0.0)
        first = claims.take()
        assert first is not None
        assert first.overlay == tmp_path / "overlays" / f"{first.key}.png"
        assert claims.take() is None
        assert not claims.is_ended()
        ledger.commit_failed(claims.held[first.key], "once more")
        again = claims.take()
        assert again is not None
        assert again.key == first.key
        finish(ledger, claims.held[again.key])
        assert claims.take() is None
        assert not claims.is_ended()
        finish(other, theirs)
        assert claims.take() is None
        assert claims.is_ended()


def test_a_silent_lease_is_taken_over_and_its_owner_cannot_commit(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides", 1)
    with (
        opened(tmp_path / "out", items, terms=LeaseTerms(ttl_s=0.001)) as slow,
        opened(tmp_path / "out", items) as quick,
    ):
        lost = claimed(slow)
        deadline = time.monotonic() + 30
        taken = quick.claim()
        while taken is None and time.monotonic() < deadline:
            taken = quick.claim()
        assert taken is not None
        assert taken.attempt == 2
        small_features(lost.features, lost.item)
        assert not lost.lost.is_set()
        slow.heartbeat()  # as the thread beats: it tells, and does not raise
        assert lost.lost.is_set()
        assert not slow.has_leases
        for settle in (
            lambda: slow.commit_done(lost),
            lambda: slow.commit_failed(lost, "too late"),
            lambda: slow.release(lost),
            lost.heartbeat,
        ):
            with pytest.raises(LeaseLostError, match=r"slide s0 must be held .* next slide"):
                settle()
        assert quick.counts() == {"running": 1}
        with settles(slow, lost):
            slow.commit_done(lost)  # in a stream, the other worker's slide is let go
        quick.commit_done(taken)
        assert quick.counts() == {"done": 1}


def test_the_heartbeat_keeps_a_lease(tmp_path: Path) -> None:
    items = cohort(tmp_path / "slides", 1)
    terms = LeaseTerms(ttl_s=0.4)
    with opened(tmp_path / "out", items, terms=terms) as one, one.beating():
        lease = claimed(one)
        with opened(tmp_path / "out", items, terms=terms) as two:
            until = time.monotonic() + 4 * terms.ttl_s
            while time.monotonic() < until:
                assert two.claim() is None
        lease.heartbeat()
        assert not lease.lost.is_set()


KILLED = """
import os, signal, sys
from pathlib import Path
from modaltune.engine.cohort import SlideItem
from modaltune.engine.ledger import Ledger
from modaltune.testing_features import SMALL_RECIPE
items = [SlideItem(Path(p), Path(p).stem, "case" + Path(p).stem[1:]) for p in sys.argv[2:]]
ledger = Ledger.open(sys.argv[1], SMALL_RECIPE, items, features="features_small")
lease = ledger.claim()
others = [ledger.claim() for _ in range({others})]
left = lease.features.parent
left.mkdir(exist_ok=True)
(left / f".{lease.item.slide_id}.0123456789abcdef.modaltune-tmp.h5").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_one(out: Path, items: list[SlideItem], claims: int = 1) -> None:
    """Claim slides in a process that is killed while it writes the first."""
    program = KILLED.replace("{others}", str(claims - 1))
    words = [sys.executable, "-c", program, str(out), *(str(item.path) for item in items)]
    assert subprocess.run(words, check=False).returncode == -9


def test_a_killed_processs_slide_is_taken_at_once_and_comes_last(tmp_path: Path) -> None:
    items, out = cohort(tmp_path / "slides"), tmp_path / "out"
    kill_one(out, items)
    assert len(list((out / FEATURES).iterdir())) == 1
    with opened(out, items) as ledger:
        assert ledger.reconciled.removed == [".s2.0123456789abcdef.modaltune-tmp.h5"]
        assert list((out / FEATURES).iterdir()) == []
        row = ledger.rows()[2]
        assert (row.status, row.attempts) == ("pending", 1)
        assert "died at it (time 1 of 10)" in row.reason
        order = [(claimed(ledger).item.slide_id) for _ in items]
        assert order == ["s1", "s0", "s2"]


def test_a_process_dies_at_the_oldest_of_its_slides(tmp_path: Path) -> None:
    """A stream holds several; only one death is counted, the others were hardly begun."""
    items, out = cohort(tmp_path / "slides"), tmp_path / "out"
    kill_one(out, items, claims=3)
    with opened(out, items) as ledger:
        rows = {row.slide_id: (row.status, row.attempts) for row in ledger.rows()}
        assert rows == {"s2": ("pending", 1), "s1": ("pending", 0), "s0": ("pending", 0)}


def test_a_slide_that_kills_is_quarantined(tmp_path: Path) -> None:
    items, out = cohort(tmp_path / "slides", 1), tmp_path / "out"
    for _ in range(2):
        kill_one(out, items)
    with opened(out, items, terms=LeaseTerms(max_deaths=2)) as ledger:
        (row,) = ledger.rows()
        assert row.status == "quarantined"
        assert "time 2 of 2" in row.reason
        assert ledger.claim() is None


def test_the_temporary_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    items, out = cohort(tmp_path / "slides", 1), tmp_path / "out"
    with opened(out, items) as ledger:
        lease = claimed(ledger)
        lease.features.parent.mkdir()
        temp = lease.features.with_name(".s0.0123456789abcdef.modaltune-tmp.h5")
        temp.write_bytes(b"half")
        opened(out, items).close()
        assert temp.exists()


def test_processes_are_told_apart() -> None:
    here = Worker.current()
    assert not here.is_gone()
    assert Worker(here.host, here.machine, here.pid, (here.started or 0) + 1).is_gone()
    assert not Worker(here.host, "another machine", here.pid, None).is_gone()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # a zombie: its parent did not look yet
    assert Worker(here.host, here.machine, child, None).is_gone()
    os.waitpid(child, 0)
    assert Worker(here.host, here.machine, child, None).is_gone()


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "out", cohort(tmp_path / "slides")) as ledger:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ledger.claim()
            except RuntimeError as error:
                code = 0 if "open it again in the child" in str(error) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_recipe_that_came_in_between_stops_a_worker(tmp_path: Path) -> None:
    items, out = cohort(tmp_path / "slides"), tmp_path / "out"
    with opened(out, items) as ledger:
        Ledger.open(out, {**SMALL_RECIPE, "tile_px": 32}, items, features=FEATURES).close()
        with pytest.raises(LedgerError, match=r"recipe of .* must stay as it is"):
            ledger.claim()


@pytest.mark.parametrize("terms", [{"ttl_s": 0}, {"max_attempts": 0}, {"max_deaths": 0}])
def test_terms_are_checked(terms: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(terms))} must be at least"):
        LeaseTerms(**terms)
