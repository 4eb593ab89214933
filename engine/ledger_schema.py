"""The ledger's file: its tables, how it is opened, and what its database says when it can't be."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from modaltune.engine.atomic import fsync_folder, is_temporary, names_full_disk
from modaltune.engine.errors import DiskFullError, LedgerError

LEDGER_NAME = "ledger.sqlite"
SCHEMA_VERSION = 1
_APPLICATION_ID = 0x4D544C47  # "MTLG", in the file's header
BUSY_S = 30.0  # how long to wait for another process's transaction

_STALE_S = 3600.0  # age at which a temporary file has no living writer

# A set is one encoder's folder of feature files with the recipe they are made by. `queue_rank`
# orders what is left, smallest first; `judged` is the recipe that the file of `file_size` and
# `file_mtime_ns` was last compared with, so that no file is opened twice.
_TABLES = """
CREATE TABLE sets (
    id INTEGER PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    recipe TEXT NOT NULL,
    recipe_sha256 TEXT NOT NULL
);
CREATE TABLE slides (
    id INTEGER PRIMARY KEY,
    set_id INTEGER NOT NULL REFERENCES sets (id),
    slide_id TEXT NOT NULL,
    case_id TEXT NOT NULL,
    path TEXT NOT NULL,
    base_mpp REAL,
    features TEXT NOT NULL,
    queue_rank REAL NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (
        status IN ('pending', 'running', 'done', 'empty', 'failed', 'quarantined')),
    attempts INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    reader TEXT NOT NULL DEFAULT '',
    tiles INTEGER NOT NULL DEFAULT 0,
    timings TEXT NOT NULL DEFAULT '{}',
    payload_sha256 TEXT NOT NULL DEFAULT '',
    file_size INTEGER,
    file_mtime_ns INTEGER,
    judged TEXT,
    finished_at REAL,
    updated_at REAL NOT NULL,
    UNIQUE (set_id, slide_id)
);
CREATE INDEX claimable ON slides (set_id, attempts, queue_rank, id)
    WHERE status IN ('pending', 'failed');
CREATE TABLE leases (
    slide INTEGER PRIMARY KEY REFERENCES slides (id),
    token TEXT NOT NULL UNIQUE,
    host TEXT NOT NULL,
    machine TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started INTEGER,
    claimed_at REAL NOT NULL,
    beat_at REAL NOT NULL,
    expires_at REAL NOT NULL
);
"""

# Shared memory between hosts, which write-ahead logging needs, exists on none of these.
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p"}
    | {"glusterfs", "orangefs", "pvfs2", "panfs", "wekafs"}
)
_MOUNTS = Path("/proc/self/mountinfo")


def connect(folder: Path, *, busy_s: float = BUSY_S) -> sqlite3.Connection:
    """Open the ledger of an output folder to read and write; made whole if there is none.

    The connection is in autocommit mode (see `transaction`) and may be used by several threads,
    one at a time.

    Args:
        folder: The output folder; created if need be.
        busy_s: How long to wait for another process's transaction, seconds.

    Raises:
        LedgerError: It can't be opened or written, is something else, or of a later version.
        DiskFullError: There is no room for it.
    """
    path = folder / LEDGER_NAME
    with names_errors(path), names_full_disk(path):
        if not path.exists():
            _create(path)
        _remove_stale(folder)
        db = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        try:
            _check(db, path)
            _set_journal(db, path, busy_s)
            db.execute("PRAGMA temp_store=MEMORY")
        except BaseException:
            db.close()
            raise
    return db


def connect_readonly(folder: Path) -> sqlite3.Connection:
    """Open the ledger of an output folder to look at it.

    Raises:
        LedgerError: There is none, or it can't be read.
    """
    path = folder / LEDGER_NAME
    if not path.is_file():
        raise LedgerError(
            f"{folder} must hold {LEDGER_NAME}, got none; name the --out folder of a "
            "`modaltune embed` run"
        )
    with names_errors(path):
        # Where nothing may be written, not even the shared memory beside it, the file alone counts.
        log = path.with_name(f"{LEDGER_NAME}-wal")
        alone = not os.access(folder, os.W_OK) and not (log.exists() and log.stat().st_size)
        address = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
        db = sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None)
        try:
            _check(db, path)
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, *, durable: bool) -> Iterator[None]:
    """Run a block as one writing transaction, undone if it raises.

    Args:
        db: From `connect`.
        durable: Whether it must survive a power cut once the block has ended, which costs an fsync.
            What is not durable survives the death of the process all the same.
    """
    db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # The database may have rolled back by itself, as it does on a full disk.
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def names_errors(path: Path) -> Iterator[None]:
    """Turn errors of the database into ones that name the file, the rule and the way out.

    Raises:
        LedgerError: The block failed in the database.
        DiskFullError: There was no room.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _named(path, error) from error
    except DiskFullError:
        raise
    except OSError as error:
        raise LedgerError(
            f"{path} must lie in a folder that can be read and written, got {error}; mend its "
            "rights, or choose another --out"
        ) from error


def is_network(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Tell whether a file lies on a network or user-space file system, as far as is known."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    here, best, kind = path.absolute().resolve(), -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split()[4].replace("\\040", " "))
        # Of two mounts on one folder the later hides the earlier.
        if len(mount.parts) >= best and here.is_relative_to(mount):
            best, kind = len(mount.parts), rest.split()[0]
    return kind in _NETWORK or kind.startswith("fuse")


def _create(path: Path) -> None:
    """Make an empty ledger under a temporary name and give it its own, unless one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.modaltune-tmp.sqlite")
    try:
        with contextlib.closing(sqlite3.connect(temp, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=FULL")
            # Written into the file, so that those who open it at once need not change it.
            db.execute(f"PRAGMA journal_mode={_journal_mode(path)}")
            db.executescript(
                f"BEGIN;PRAGMA application_id={_APPLICATION_ID};"
                f"PRAGMA user_version={SCHEMA_VERSION};{_TABLES}COMMIT;"
            )
        with contextlib.suppress(FileExistsError):
            _give_name(temp, path)
        fsync_folder(path.parent)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            temp.with_name(f"{temp.name}{suffix}").unlink(missing_ok=True)


def _journal_mode(path: Path) -> str:
    return "truncate" if is_network(path) else "wal"


def _set_journal(db: sqlite3.Connection, path: Path, busy_s: float) -> None:
    """Give a ledger that came from another file system the journal of this one.

    Two that change it at once refuse each other without waiting, so this asks again.
    """
    wanted, until = _journal_mode(path), time.monotonic() + busy_s
    while db.execute("PRAGMA journal_mode").fetchone()[0] != wanted:
        try:
            db.execute(f"PRAGMA journal_mode={wanted}")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= until:
                raise
            time.sleep(random.uniform(0.01, 0.05))


def _remove_stale(folder: Path) -> None:
    """Remove what killed writers of the output folder's own files left there, once it is old.

    Feature files lie below, and are known by their leases; reports and ledgers have none.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_temporary(entry.name):
                continue
            # A writer that lives may give its file another name, or remove it, at any moment.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > _STALE_S:
                    os.unlink(entry.path)


def _give_name(temp: Path, path: Path) -> None:
    try:
        os.link(temp, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        temp.rename(path)


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database of others, and one of a version this code does not know."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise LedgerError(
            f"{path} must be a ModalTune ledger, got another program's database; move it away, or "
            "choose another --out"
        )
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"{path} must have ledger version {SCHEMA_VERSION}, got {version}; use the ModalTune "
            "that wrote it, or move it away: finished slides are found by their files"
        )


def _named(path: Path, error: sqlite3.Error) -> Exception:
    """Say in words what the database says in its own."""
    said = str(error)
    if "disk is full" in said:
        return DiskFullError(
            f"{path} must fit on its disk, got {said!r}; free space, or raise the quota or the "
            "limit of a file's size (ulimit -f), then run the same command: finished work is kept"
        )
    for words, rule, way_out in (
        (("not a database", "malformed", "no such table", "no such column"),
         "be a ModalTune ledger",
         "move it away: finished slides are found by their files"),
        (("locked", "busy"),
         "be free at least once in half a minute",
         "another process holds it: look with `modaltune status`, end a process that hangs, or "
         "wait, then run the same command"),
        (("readonly", "read-only", "unable to open"),
         "lie in a folder that can be written",
         "mend the rights of the folder, or choose another --out"),
    ):  # fmt: skip
        if any(word in said for word in words):
            return LedgerError(f"{path} must {rule}, got {said!r}; {way_out}")
    return LedgerError(
        f"{path} must lie on a disk with room, without faults, that can lock files, got {said!r}; "
        "free space or raise the limit of a file's size (ulimit -f), or choose an --out on a local "
        "disk, then run the same command: finished work is kept"
    )
