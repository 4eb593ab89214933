"""What a command costs with all its children: wall-clock and processor seconds, peak memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modaltune.engine.errors import InputError

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOST_PAGES = 2**40  # of a file
# Of an entry of /proc/PID/pagemap: the page is present, and is a file's or shared memory's.
_IN_FILE = np.uint64(1 << 63 | 1 << 61)
_DEVICES = (b"/dev/nvidia", b"/dev/dri")  # address space, terabytes of it, not memory
_PF_FORKNOEXEC = 0x40  # of the kernel's flags of a process


@dataclass(frozen=True)
class Finished:
    """How a command went.

    Attributes:
        code: Exit status; negative for a signal.
        wall_s: Seconds until it had ended.
        cpu_s: Seconds of processor time, user and system, of it and of the children it waited for.
        peak_mib: Most memory of all its processes at a time (`TreeMemory`); None where it was not
            watched.
    """

    code: int
    wall_s: float
    cpu_s: float
    peak_mib: float | None


def tree_pids(root: int) -> list[int]:
    """Return a process and its descendants; those that end meanwhile may be missed."""
    pids = [root]
    for pid in pids:  # grows while it is walked
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
        except OSError:
            continue
        for task in tasks:
            try:
                children = (task / "children").read_text(encoding="ascii")
            except OSError:
                continue
            pids += [int(child) for child in children.split()]
    return pids


class TreeMemory:
    """Resident memory of a process and its descendants; a page that they share counts once.

    It is that of the processes by themselves: a page of a library counts in full, whoever else on
    the machine has it mapped. The kernel's proportional size (Pss) would change by a hundred MiB
    with the start and end of another process that has torch loaded.

    Args:
        root: Process id.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._counts: list[tuple[int, float, float]] = []
        self._mapped_mib = 0.0

    def mib(self) -> float:
        """Return how much it is now; 0 where the process has ended."""
        pids = tree_pids(self._root)
        own: dict[int, float] = {}
        counts = []
        is_forked = False
        for pid in pids:
            with contextlib.suppress(OSError):  # one that has just ended
                status = _kib(pid, "status")
                own[pid] = status.get("RssAnon", 0.0)
                counts.append((pid, status.get("RssFile", 0.0), status.get("RssShmem", 0.0)))
                is_forked |= _is_forked(pid)
        if is_forked:  # what has no file is shared too, and the kernel is slow to say how much
            for pid in own:
                with contextlib.suppress(OSError):
                    own[pid] = _kib(pid, "smaps_rollup").get("Pss_Anon", 0.0)
        if counts != self._counts:  # looking at every page takes a tenth of a second
            self._mapped_mib, self._counts = _mapped_mib(pids), counts
        return sum(own.values()) / 1024 + self._mapped_mib


def _kib(pid: int, file: str) -> dict[str, float]:
    """Return the sizes in a file below /proc/PID; none of a process at its end."""
    lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
    words = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): float(size) for name, size, _ in words}


def _is_forked(pid: int) -> bool:
    """Whether a process runs the program of its parent, in copies of the parent's pages."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return bool(int(text.rpartition(")")[2].split()[6]) & _PF_FORKNOEXEC)


def _mapped_mib(pids: Sequence[int]) -> float:
    """Return mapped pages of files and of shared memory, each once."""
    numbers: dict[tuple[bytes, bytes], int] = {}
    found = [np.empty(0, dtype=np.int64)]
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        except OSError:
            continue
        try:
            for line in maps:
                span, _, offset, device, inode, *name = line.split(None, 5)
                if inode == b"0" or (name and name[0].startswith(_DEVICES)):
                    continue
                start, end = (int(x, 16) // _PAGE for x in span.split(b"-"))
                data = os.pread(pagemap, (end - start) * 8, start * 8)
                entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
                pages = np.flatnonzero((entries & _IN_FILE) == _IN_FILE)
                number = numbers.setdefault((device, inode), len(numbers))
                found.append(pages + (number * _MOST_PAGES + int(offset, 16) // _PAGE))
        finally:
            os.close(pagemap)
    keys = np.sort(np.concatenate(found))  # numpy.unique would hash: ten times as slow
    return (keys.size - int(np.count_nonzero(keys[1:] == keys[:-1]))) * _PAGE / 2**20


def run_measured(
    words: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
    watch_s: float | None = None,
    timeout_s: float = 900.0,
) -> Finished:
    """Run a command to its end.

    Args:
        words: The command.
        log: File that its output goes to.
        environment: Its environment.
        folder: Where it runs; None for here.
        watch_s: Seconds between two looks at its memory; None looks at none, which costs nothing.
        timeout_s: Seconds after which it is ended.

    Raises:
        InputError: It took longer.
    """
    peak = 0.0
    ended = threading.Event()
    with log.open("wb") as out:
        start = time.monotonic()
        process = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment),
            cwd=folder,
        )  # fmt: skip
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()

        def watch(every_s: float) -> None:
            nonlocal peak
            memory = TreeMemory(process.pid)
            while not ended.wait(every_s):
                peak = max(peak, memory.mib())

        watcher = None if watch_s is None else threading.Thread(target=watch, args=(watch_s,))
        if watcher is not None:
            watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - start
        finally:
            timer.cancel()
            ended.set()
            if watcher is not None:
                watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if wall_s > timeout_s:
        raise InputError(f"{words[0]} must end within {timeout_s:g} s, got no end; see {log}")
    return Finished(
        code=process.returncode,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mib=peak if watch_s is not None else None,
    )
