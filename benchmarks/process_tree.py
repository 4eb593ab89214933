"""What a command costs with all its children: wall-clock and processor seconds, peak memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modaltune.engine.errors import InputError


@dataclass(frozen=True)
class Finished:
    """How a command went.

    Attributes:
        code: Exit status; negative for a signal.
        wall_s: Seconds until it had ended.
        cpu_s: Seconds of processor time, user and system, of it and of the children it waited for.
        peak_mib: Most memory of all its processes at a time, shared pages counted once; None where
            it was not watched.
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


def memory_mib(root: int) -> float:
    """Return resident memory of a process and its descendants; shared pages count once."""
    total = 0
    for pid in tree_pids(root):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:  # one that has just ended
            continue
        total += next((int(x.split()[1]) for x in text.splitlines() if x[:4] == "Pss:"), 0)
    return total / 1024


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
            while not ended.wait(every_s):
                peak = max(peak, memory_mib(process.pid))

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
