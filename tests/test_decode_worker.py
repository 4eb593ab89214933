"""A decoding process that is ended in the middle of its work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from modaltune.engine.decode_jobs import SlideSource, SurveyJob, TileOptions
from modaltune.engine.decode_worker import Assigned, Worker
from modaltune.engine.shared_tiles import SharedTiles

# Writes a picture under a process id of our choice, and dies before it has its name.
HALF_DRAWN = """
import os, sys
from modaltune.engine.atomic import atomic_path
os.getpid = lambda: int(sys.argv[2])
with atomic_path(sys.argv[1]) as picture:
    picture.touch()
    os._exit(0)
"""


def test_a_picture_that_a_killed_worker_was_drawing_goes_with_it(tmp_path: Path) -> None:
    shared = SharedTiles((1, 1, 16))
    worker: Worker[None] = Worker(shared, "cpu")
    job = SurveyJob(
        SlideSource(tmp_path / "s.svs", None, None, "cpu"),
        TileOptions(),
        tmp_path / "overlays" / "s.png",
        None,
        1,
    )
    worker.give(Assigned(job, None, 60.0))
    for name, pid in (("s.png", worker.pid), ("other.png", worker.pid), ("s.png", worker.pid + 1)):
        picture = tmp_path / "overlays" / name
        subprocess.run([sys.executable, "-c", HALF_DRAWN, str(picture), str(pid)], check=True)
    worker.end(0.0)
    shared.close()
    left = sorted(path.name.split(".")[1:3] for path in (tmp_path / "overlays").iterdir())
    assert [(stem, int(token[:8], 16)) for stem, token in left] == [
        ("other", worker.pid), ("s", worker.pid + 1)
    ]  # fmt: skip


def test_a_worker_maps_its_slabs_while_it_waits() -> None:
    slab_bytes = 4 * 64 * 64 * 3
    shared = SharedTiles((3, 4, 64))
    worker: Worker[None] = Worker(shared, "cpu", ahead=[2])
    assert worker.receive() is None
    deadline = time.monotonic() + 60
    while os.fstat(shared.descriptor).st_blocks * 512 < slab_bytes:
        assert time.monotonic() < deadline
        os.sched_yield()
    assert os.lseek(shared.descriptor, 0, os.SEEK_DATA) == 2 * slab_bytes
    assert worker.end(10.0) == "exit code 0"
    shared.close()
