"""A worker process as the parent sees it: start it, give it jobs, judge its death, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar

from modaltune.engine.atomic import remove_temporaries
from modaltune.engine.decode_jobs import DecodeJob, Reply, SurveyJob
from modaltune.engine.shared_tiles import SharedTiles

T = TypeVar("T")

# A reply is sent at one go: one that stops half-way for this long will not be finished.
_RECEIVE_S = 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TAIL_BYTES = 400


@dataclass
class Assigned(Generic[T]):
    """A job in a worker's hands; `owner` is the caller's own record of it."""

    job: SurveyJob | DecodeJob
    owner: T
    timeout_s: float


class Worker(Generic[T]):
    """One child process with its jobs, oldest first; it works on the first one.

    Used by one thread only, which must outlive it: the kernel ends the child with that thread.

    Args:
        shared: Memory for its pixels.
        device: Where it decodes.
        warm_up: Rule of tissue whose loops it loads at once; None loads them when they are needed.
        ahead: Slabs that it maps as long as it has no job.
    """

    def __init__(
        self,
        shared: SharedTiles,
        device: str,
        warm_up: str | None = None,
        ahead: Sequence[int] = (),
    ) -> None:
        self.jobs: deque[Assigned[T]] = deque()
        self.is_ready = False
        self.has_surveyed = warm_up is not None  # so it has loaded what that takes
        self.since = time.monotonic()  # when it started, or began its first job
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _RECEIVE_S, 0))
        self._noise = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115  (end() closes it)
        slabs, tiles, tile_px = shared.array.shape[:3]
        argument = {
            "parent": os.getpid(),
            "socket": theirs.fileno(),
            "memory": shared.descriptor,
            "shape": [slabs, tiles, tile_px],
            "device": device,
            "warm_up": warm_up,
            "ahead": list(ahead),
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "modaltune.engine.decode_child", json.dumps(argument)],
                pass_fds=(theirs.fileno(), shared.descriptor),
                stdin=subprocess.DEVNULL,
                stdout=self._noise,
                stderr=self._noise,
                env=_environment(),
                # Ctrl-C is for the parent, which ends its workers in order.
                start_new_session=True,
            )
        finally:
            theirs.close()
        self.connection: Connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def give(self, assigned: Assigned[T]) -> None:
        """Hand over a job; a worker that is gone shows when its reply is asked for."""
        if not self.jobs:
            self.since = time.monotonic()
        self.has_surveyed |= isinstance(assigned.job, SurveyJob)
        self.jobs.append(assigned)
        with contextlib.suppress(OSError):
            self.connection.send(assigned.job)

    def receive(self) -> tuple[Assigned[T], Reply] | None:
        """Take the reply to the first job; None for the greeting of a new worker.

        Raises:
            EOFError, OSError: The child has died, or hangs.
        """
        message = self.connection.recv()
        self.since = time.monotonic()
        if not self.is_ready:
            self.is_ready = True
            return None
        return self.jobs.popleft(), message

    def memory_bytes(self) -> int:
        """Memory of the child's own, without files and shared memory; 0 once it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()
        except OSError:
            return 0
        return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES

    def end(self, patience_s: float) -> str:
        """End the child if it has not ended by itself in time, and say how it ended.

        A picture that it was drawing does not stay half drawn.
        """
        with contextlib.suppress(OSError):
            self.connection.close()
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for job in (assigned.job for assigned in self.jobs):
            if isinstance(job, SurveyJob) and job.overlay is not None:
                remove_temporaries(job.overlay, self.pid)  # it may have died while it drew
        how = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
        self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, self._noise.tell() - _TAIL_BYTES))
        tail = " ".join(self._noise.read().decode("utf-8", "replace").split())
        self._noise.close()
        return f"{how}: {tail}" if tail else how


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _environment() -> dict[str, str]:
    """The child's environment: it imports what the parent would, with one thread per library."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["PYTHONSAFEPATH"] = "1"  # those paths, and no folder beside them
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    return environment
