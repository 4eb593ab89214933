"""Keep the noise of slide libraries from users: what they print becomes log lines."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

logger = logging.getLogger(__name__)

# The file descriptors belong to the whole process, so one thread at a time may swap them.
_SWAP = threading.RLock()


class _Collect(logging.Filter):
    """Hold back a library's own log records and keep their text."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the text, drop the record."""
        self._lines.append(record.getMessage())
        return False


@contextlib.contextmanager
def quiet_libraries(what: str) -> Iterator[None]:
    """Turn what C code prints, and what tifffile logs, into log lines at debug level.

    Descriptors 1 and 2 point to a temporary file meanwhile, so whatever another thread prints in
    that time lands in the log too: for opening files and first imports, not for hot loops.

    Args:
        what: Prefix of the log lines, such as the slide's name.
    """
    lines: list[str] = []
    collect = _Collect(lines)
    tifffile_logger = logging.getLogger("tifffile")
    with _SWAP, tempfile.TemporaryFile() as sink:
        tifffile_logger.addFilter(collect)
        saved = _divert(sink)
        try:
            yield
        finally:
            _restore(saved)
            tifffile_logger.removeFilter(collect)
            sink.seek(0)
            lines += sink.read().decode("utf-8", "replace").splitlines()
            for line in dict.fromkeys(lines):
                logger.debug("%s: %s", what, line)


def _flush() -> None:
    """Flush Python's streams and the C library's buffers, so that no line crosses the swap."""
    for stream in (sys.stdout, sys.stderr):
        # A stream can be absent (pythonw) or closed already (at exit).
        if stream is not None and not stream.closed:
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _divert(sink: IO[bytes]) -> dict[int, int]:
    """Point descriptors 1 and 2 at the sink; return where they pointed."""
    _flush()
    saved = {}
    for descriptor in (1, 2):
        # A daemon may have closed them.
        with contextlib.suppress(OSError):
            saved[descriptor] = os.dup(descriptor)
            os.dup2(sink.fileno(), descriptor)
    return saved


def _restore(saved: dict[int, int]) -> None:
    """Point the descriptors back."""
    _flush()
    for descriptor, original in saved.items():
        os.dup2(original, descriptor)
        os.close(original)
