"""The ledger's file where it is odd: other files, other versions, network disks, locks, rights."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from modaltune.engine import ledger_schema
from modaltune.engine.cohort import SlideItem
from modaltune.engine.errors import DiskFullError, LedgerError
from modaltune.engine.ledger import Ledger
from modaltune.engine.ledger_report import read_status, retry_slides
from modaltune.engine.ledger_schema import (
    LEDGER_NAME,
    connect,
    connect_readonly,
    is_network,
    names_errors,
    transaction,
)
from modaltune.testing_features import SMALL_RECIPE


def mode(db: sqlite3.Connection, name: str) -> object:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def test_a_new_ledger_is_durable_and_known(tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path / "new" / "out")) as db:
        assert mode(db, "journal_mode") == "wal"
        with transaction(db, durable=True):
            assert mode(db, "synchronous") == 2  # FULL
        with transaction(db, durable=False):
            assert mode(db, "synchronous") == 1  # NORMAL
        assert mode(db, "user_version") == ledger_schema.SCHEMA_VERSION
    assert os.listdir(tmp_path / "new" / "out") == [LEDGER_NAME]


def test_a_transaction_that_raises_is_undone(tmp_path: Path) -> None:
    insert = "INSERT INTO sets (folder, recipe, recipe_sha256) VALUES ('a', '{}', '')"
    with contextlib.closing(connect(tmp_path)) as db:
        with pytest.raises(sqlite3.IntegrityError), transaction(db, durable=True):
            _ = [db.execute(insert) for _ in range(2)]  # the second breaks UNIQUE
        assert db.execute("SELECT COUNT(*) FROM sets").fetchone() == (0,)


def test_files_that_are_no_ledgers_are_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    for content in (b"Dear diary, this is no database at all.\n" * 40, b"SQLite format 3\0" * 99):
        path.write_bytes(content)
        for look in (connect, connect_readonly):
            with pytest.raises(LedgerError, match=r"ledger.sqlite must .*move it away"):
                look(tmp_path)
        assert path.read_bytes() == content
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (name)")
    with pytest.raises(LedgerError, match=r"got another program's database; move it away"):
        connect(tmp_path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(LedgerError, match=r"ledger version 1, got 99; use the ModalTune that"):
        connect(tmp_path)


def test_a_damaged_ledger_says_so(tmp_path: Path) -> None:
    items = [SlideItem(tmp_path / f"{i}.svs", f"s{i}", f"s{i}") for i in range(500)]
    Ledger.open(tmp_path, SMALL_RECIPE, items, features="f").close()
    path = tmp_path / LEDGER_NAME
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(LedgerError, match=r"be a ModalTune ledger.*found by their files"):
        Ledger.open(tmp_path, SMALL_RECIPE, items, features="f")


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LedgerError, match=r"must lie in a folder that can be read and written"):
        connect(tmp_path / "file" / "out")


def test_a_readonly_ledger_names_the_way_out(tmp_path: Path) -> None:
    connect(tmp_path).close()
    with (
        contextlib.closing(connect_readonly(tmp_path)) as db,
        pytest.raises(LedgerError, match=r"can be written, got .*readonly.*mend the rights"),
        names_errors(tmp_path / LEDGER_NAME),
        transaction(db, durable=True),
    ):
        db.execute("DELETE FROM slides")


def test_a_ledger_on_a_readonly_disk_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [SlideItem(tmp_path / "a.svs", "a", "a")]
    Ledger.open(tmp_path, SMALL_RECIPE, items, features="f").close()
    monkeypatch.setattr(ledger_schema.os, "access", lambda *_: False)  # root may write anywhere
    (one,) = read_status(tmp_path)
    assert one.counts["pending"] == 1
    assert os.listdir(tmp_path) == [LEDGER_NAME]


def test_old_temporary_files_of_the_folder_itself_are_removed(tmp_path: Path) -> None:
    old, young = (tmp_path / f".report.{c * 16}.modaltune-tmp.json" for c in "ab")
    for path in (old, young, tmp_path / "mine.json"):
        path.write_text("{")
    os.utime(old, (0, 0))
    os.utime(tmp_path / "mine.json", (0, 0))
    connect(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [young.name, LEDGER_NAME, "mine.json"]


def test_no_ledger_to_look_at(tmp_path: Path) -> None:
    for look in (read_status, retry_slides):
        with pytest.raises(LedgerError, match=r"must hold ledger.sqlite, got none; name the --out"):
            look(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_never_ends_is_named(tmp_path: Path) -> None:
    items = [SlideItem(tmp_path / "a.svs", "a", "a")]
    with contextlib.closing(connect(tmp_path)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"another process holds it.*modaltune status"):
            Ledger.open(tmp_path, SMALL_RECIPE, items, features="f", busy_s=0.01)
        holder.execute("ROLLBACK")
    Ledger.open(tmp_path, SMALL_RECIPE, items, features="f", busy_s=0.01).close()


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("database or disk is full", DiskFullError, "free space"),
        ("disk I/O error", LedgerError, "free space.*local disk"),
        ("locking protocol", LedgerError, "free space.*local disk"),
    ],
)
def test_what_only_broken_disks_say(
    tmp_path: Path, said: str, error: type[Exception], words: str
) -> None:
    message = f"ledger.sqlite must .*got '{said}'.*{words}"
    with pytest.raises(error, match=message), names_errors(tmp_path / LEDGER_NAME):
        raise sqlite3.OperationalError(said)


MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/root rw
40 22 0:50 / {folder}/net rw - nfs4 server:/export rw
41 40 8:2 / {folder}/net/local rw - xfs /dev/sdb rw
42 22 0:51 / {folder}/with\\040space rw - fuse.sshfs host: rw
43 22 0:52 / {folder}/over rw - nfs server:/a rw
44 22 8:3 / {folder}/over rw - ext4 /dev/sdc rw
"""


def test_network_file_systems_are_known(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(folder=tmp_path))
    for name, want in (
        ("here", False), ("net/out", True), ("net/local/out", False), ("with space/out", True),
        ("over/out", False), ("network/out", False),
    ):  # fmt: skip
        assert is_network(tmp_path / name / LEDGER_NAME, mounts) is want, name
    assert not is_network(tmp_path, tmp_path / "no such table")


def test_network_disks_go_without_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [SlideItem(tmp_path / f"{i}.svs", f"s{i}", f"s{i}") for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(ledger_schema, "is_network", lambda path: True)
        with Ledger.open(tmp_path, SMALL_RECIPE, items, features="f") as one:
            with contextlib.closing(connect(tmp_path)) as db:
                assert mode(db, "journal_mode") == "truncate"
            with Ledger.open(tmp_path, SMALL_RECIPE, items, features="f") as two:
                first, second = one.claim(), two.claim()
                assert first is not None
                assert second is not None
                assert first.item != second.item
            assert not (tmp_path / f"{LEDGER_NAME}-wal").exists()
    with contextlib.closing(connect(tmp_path)) as db:  # copied to a local disk
        assert mode(db, "journal_mode") == "wal"


CLAIM = """
import sys
from pathlib import Path
from modaltune.engine.cohort import SlideItem
from modaltune.engine.ledger import Ledger
from modaltune.testing_features import SMALL_RECIPE
print("ready", flush=True)
for line in sys.stdin:
    out = Path(line.strip())
    items = [SlideItem(out / f"{i}.svs", f"s{i}", f"s{i}") for i in range(8)]
    ledger = Ledger.open(out, SMALL_RECIPE, items, features="f")
    print(ledger.claim().item.slide_id, flush=True)
"""


@pytest.mark.parametrize("came_from", ["nowhere", "a network disk"])
def test_eight_processes_open_one_ledger_at_once(tmp_path: Path, came_from: str) -> None:
    """Thirty times: a race for the new file, or for its journal, shows in one of a dozen."""
    words = [sys.executable, "-c", CLAIM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(words, **pipes) for _ in range(8)]

    def said() -> list[str]:
        return [worker.stdout.readline().strip() for worker in workers]

    assert said() == ["ready"] * 8
    for out in (tmp_path / f"out{i}" for i in range(30)):
        if came_from == "a network disk":
            with contextlib.closing(connect(out)) as db:
                db.execute("PRAGMA journal_mode=delete")
        for worker in workers:
            worker.stdin.write(f"{out}\n")
            worker.stdin.flush()
        assert sorted(said()) == [f"s{i}" for i in range(8)]
    for worker in workers:
        worker.communicate()
    (one,) = read_status(out)
    assert [lease.state for lease in one.running] == ["gone"] * 8
