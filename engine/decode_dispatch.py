"""The decoder's one thread in the parent: hands out jobs, collects replies, ends what hangs."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_jobs import (
    DecodeJob,
    Device,
    Refusal,
    Reply,
    SlideSource,
    Survey,
    SurveyJob,
    TileOptions,
)
from modaltune.engine.decode_progress import Broken, Event, Found, Over, Progress, Ready
from modaltune.engine.decode_read import ReadShape
from modaltune.engine.decode_worker import Assigned, Worker
from modaltune.engine.free_slabs import FreeSlabs
from modaltune.engine.shared_tiles import SharedTiles

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Jobs in a worker's hands: it goes on with the second while the parent is busy elsewhere.
_DEPTH = 2
# The last groups of all are halved down to this many tiles.
_LEAST_TILES = 16
_POLL_S = 0.1
_START_TIMEOUT_S = 120.0
_MOST_FAILED_STARTS = 3
# Workers are added while the consumer waits this long and all are at work.
_HUNGER_S = 0.2
_END_PATIENCE_S = 0.5


@dataclass(frozen=True)
class DispatchOptions:
    """What the thread goes by; see `decode.DecodeOptions`."""

    tiles: TileOptions
    device: Device
    is_half_scale: bool
    first_workers: int
    most_workers: int
    lookahead: int
    decode_timeout_s: float
    survey_timeout_s: float
    memory_bytes: int
    bad_share: float
    is_warmed_up: bool = False


Work = tuple[Progress, Int64 | None]


class Dispatcher(threading.Thread):
    """Runs the workers. Others talk to it by `call` and `give_back`; it answers in `events`."""

    def __init__(self, shared: SharedTiles, options: DispatchOptions) -> None:
        super().__init__(name="modaltune-decode", daemon=True)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.waiting_since: float | None = None
        self.pids: tuple[int, ...] = ()
        self.ready_pids: tuple[int, ...] = ()
        self._shared, self._options = shared, options
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._free = FreeSlabs(shared.array.shape[0])
        self._requests: deque[Progress] = deque()
        self._slides: list[Progress] = []
        self._workers: list[Worker[Work]] = []
        self._failed_starts = 0
        self._last_start = 0.0
        self._last_weighing = 0.0
        self._is_short = False  # guarded by the lock
        self._is_closing = False

    def call(self, what: Callable[[], None]) -> None:
        """Have the thread do something at its next turn, which comes at once."""
        with self._wake_lock:
            self._calls.append(what)
            self._wake()

    def give_back(self, slab: int) -> None:
        """Give a slab back: at the thread's next turn, which comes at once if it has no other."""
        with self._wake_lock:
            self._calls.append(partial(self._free.give, slab))
            if self._is_short:
                self._wake()

    def _wake(self) -> None:
        # The number of a closed descriptor may be another file's by now.
        if self._wake_write >= 0:
            with contextlib.suppress(BlockingIOError):  # enough is written to wake it
                os.write(self._wake_write, b"\0")

    def submit(self, slide: Progress) -> None:
        """Take a slide on; runs in this thread."""
        self._requests.append(slide)

    def drop_all(self) -> None:
        """Deliver nothing more of any slide; runs in this thread."""
        self._requests.clear()
        for slide in self._slides:
            self._end_slide(slide)

    def stop(self) -> None:
        """End all workers and this thread; runs in this thread."""
        self._is_closing = True

    def run(self) -> None:
        """Serve until stopped."""
        try:
            for _ in range(self._options.first_workers):
                self._start_worker()
            while not self._is_closing:
                self._assign()
                self._listen()
                self._watch()
        except Exception as error:  # whoever waits for events must not wait for ever
            self.events.put(Broken(f"{type(error).__name__}: {error}"))
            raise
        finally:
            for worker in self._workers:
                worker.end(0.0 if worker.jobs else _END_PATIENCE_S)
            self.pids = self.ready_pids = ()
            with self._wake_lock:
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def _start_worker(self) -> None:
        options = self._options
        # The first one is given the first survey.
        warm_up = options.tiles.tissue if options.is_warmed_up and not self._workers else None
        # Its share: those in its hands, and as many of the consumer's as came from it.
        slabs = self._free.unclaimed(self._shared.array.shape[0] // options.most_workers)
        worker: Worker[Work] = Worker(self._shared, options.device, warm_up, slabs)
        self._free.claim(slabs, worker.pid)
        self._workers.append(worker)
        self._last_start = time.monotonic()
        self._note_pids()

    def _note_pids(self) -> None:
        """Say which processes there are, for other threads to read."""
        self.pids = tuple(worker.pid for worker in self._workers)
        self.ready_pids = tuple(worker.pid for worker in self._workers if worker.is_ready)

    def _listen(self) -> None:
        """Wait for replies and calls, and handle them."""
        is_busy = any(worker.jobs or not worker.is_ready for worker in self._workers)
        sources: list[Any] = [self._wake_read, *(w.connection for w in self._workers)]
        with self._wake_lock:
            self._is_short = not self._free
            has_calls = bool(self._calls)
        ready = wait(sources, 0.0 if has_calls else _POLL_S if is_busy else None)
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        while self._calls:
            self._calls.popleft()()
        for worker in [w for w in self._workers if w.connection in ready]:
            try:
                answer = worker.receive()
            except (EOFError, OSError):
                self._replace(worker, "died with {how}", _END_PATIENCE_S)
                continue
            if answer is None:
                self._failed_starts = 0
                self._note_pids()
            else:
                self._take(*answer)

    def _take(self, assigned: Assigned[Work], reply: Reply) -> None:
        """Handle a reply."""
        slide, indices = assigned.owner
        slide.in_hand -= 1
        for line in reply.lines:
            line.log()
        result = reply.result
        if isinstance(result, Survey):
            slide.seconds.update(result.seconds)
            if not slide.is_over:
                slide.survey, slide.groups = result, deque(result.groups)
                self.events.put(Found(slide, result))
        elif isinstance(assigned.job, DecodeJob) and indices is not None:
            slide.seconds["decode"] = slide.seconds.get("decode", 0.0) + reply.seconds
            if slide.is_over or isinstance(result, Refusal):
                self._free.give(assigned.job.slab)
            else:
                self._deliver(slide, indices, result, assigned.job.slab)
        if isinstance(result, Refusal):
            self._fail(slide, result.reason, result.is_disk_full)
        self._finish_if_done(slide)

    def _deliver(self, slide: Progress, indices: Int64, is_bad: Bool, slab: int) -> None:
        """Pass decoded tiles on, unless too many of the slide's are bad by now."""
        slide.delivered += len(indices)
        slide.bad += int(is_bad.sum())
        total = len(slide.survey.grid) if slide.survey else 0
        # One bad tile never fails a slide, unless none is allowed.
        allowed = max(1.0, self._options.bad_share * total) if self._options.bad_share else 0.0
        if slide.bad > allowed:
            self._free.give(slab)
            self._fail(
                slide,
                f"bad tiles of {slide.request.path} must be at most "
                f"{100 * self._options.bad_share:g} % of {total}, got {slide.bad} so far; copy the "
                "slide again, or raise bad_share",
            )
        else:
            self.events.put(Ready(slide, indices, is_bad, slab))

    def _finish_if_done(self, slide: Progress) -> None:
        """Close a slide whose last job is back."""
        if slide.is_over or slide.survey is None or slide.groups or slide.in_hand:
            return
        self._end_slide(slide)
        self.events.put(Over(slide))

    def _fail(self, slide: Progress, reason: str, is_disk_full: bool = False) -> None:
        if not slide.is_over:
            self._end_slide(slide)
            self.events.put(Over(slide, reason, is_disk_full))

    def _end_slide(self, slide: Progress) -> None:
        slide.is_over = True
        slide.groups.clear()
        self._slides = [other for other in self._slides if other is not slide]

    def _replace(self, worker: Worker[Work], reason: str, patience_s: float) -> None:
        """End a worker, fail the slide it was at work on, and start another worker."""
        self._workers.remove(worker)
        how = worker.end(patience_s)
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_FAILED_STARTS:
                self.events.put(Broken(f"decoder processes can't start: {how}"))
                self._is_closing = True
        for place, assigned in enumerate(worker.jobs):
            slide, indices = assigned.owner
            slide.in_hand -= 1
            if isinstance(assigned.job, DecodeJob):
                self._free.give(assigned.job.slab)
            if place == 0 and worker.is_ready:
                path = slide.request.path
                self._fail(slide, f"the decoder of {path} {reason.format(how=how)}")
            elif not slide.is_over and indices is not None:
                slide.groups.appendleft(indices)
            elif not slide.is_over:
                self._slides.remove(slide)
                self._requests.appendleft(slide)
        if not self._is_closing:
            self._start_worker()

    def _watch(self) -> None:
        """End workers that take too long or too much memory; add one for a hungry consumer."""
        now, options = time.monotonic(), self._options
        # Asking for a worker's memory takes longer than all else of a turn.
        is_weighed = now - self._last_weighing >= _POLL_S
        if is_weighed:
            self._last_weighing = now
        for worker in list(self._workers):
            limit = worker.jobs[0].timeout_s if worker.jobs else None
            if not worker.is_ready:
                limit = _START_TIMEOUT_S
            if limit is not None and now - worker.since > limit:
                self._replace(worker, f"took longer than {limit:g} s and was ended", 0.0)
            elif is_weighed and worker.jobs and worker.memory_bytes() > options.memory_bytes:
                most = options.memory_bytes // 2**20
                self._replace(worker, f"took more than {most} MiB and was ended", 0.0)
        hungry = self.waiting_since
        if (
            len(self._workers) < options.most_workers
            and hungry is not None
            and now - hungry > _HUNGER_S
            and now - self._last_start > _HUNGER_S
            and all(worker.is_ready and worker.jobs for worker in self._workers)
        ):
            self._start_worker()

    def _assign(self) -> None:
        """Hand out jobs, to the least busy worker first, and surveys to one that has done some.

        A survey takes long: nothing waits behind one, nor does one wait behind anything. A worker's
        first takes half a second more. Nor do the last groups of all wait behind others.
        """
        workers = sorted(self._workers, key=lambda worker: not worker.has_surveyed)
        for depth in range(_DEPTH):
            for worker in workers:
                if not worker.is_ready or len(worker.jobs) != depth:
                    continue
                if depth and self._is_ending():
                    return
                if all(isinstance(given.job, DecodeJob) for given in worker.jobs):
                    assigned = self._next_job(worker, may_survey=depth == 0)
                    if assigned is None:
                        return
                    worker.give(assigned)

    def _is_ending(self) -> bool:
        """Whether no more groups are left than workers: each goes to whoever is free first."""
        if self._requests or any(slide.survey is None for slide in self._slides):
            return False
        ready = sum(worker.is_ready for worker in self._workers)
        return sum(len(slide.groups) for slide in self._slides) <= ready

    def _next_job(self, worker: Worker[Work], may_survey: bool) -> Assigned[Work] | None:
        """Choose between the next slide's survey and the first slide's next group."""
        ahead = sum(1 for slide in self._slides if slide.survey is None or slide.groups)
        # A slide in reserve comes first: its survey takes longer than a group, and no worker should
        # run dry at the end of a slide.
        if may_survey and self._requests and ahead < 2:
            return self._survey_job()
        if self._free:
            for slide in self._slides:
                if slide.groups and slide.survey is not None:
                    return self._decode_job(slide, slide.survey, worker)
        if may_survey and self._requests and ahead < self._options.lookahead:
            return self._survey_job()
        return None

    def _survey_job(self) -> Assigned[Work]:
        slide = self._requests.popleft()
        slide.in_hand += 1
        self._slides.append(slide)
        request, options = slide.request, self._options
        source = SlideSource(request.path, request.base_mpp, options.tiles.reader, options.device)
        most = self._shared.array.shape[1]
        job = SurveyJob(source, options.tiles, request.overlay, request.grid, most)
        return Assigned(job, (slide, None), options.survey_timeout_s)

    def _decode_job(self, slide: Progress, survey: Survey, worker: Worker[Work]) -> Assigned[Work]:
        is_ending = self._is_ending()
        indices, grid, request = slide.groups.popleft(), survey.grid, slide.request
        if is_ending and len(indices) >= 2 * _LEAST_TILES:  # so that all workers end together
            half = len(indices) // 2
            slide.groups.append(indices[half:])
            indices = indices[:half]
        slide.in_hand += 1
        job = DecodeJob(
            SlideSource(request.path, request.base_mpp, survey.reader, survey.device, survey.stamp),
            grid.coords[indices],
            ReadShape(grid.level, grid.read_px, grid.tile_px),
            self._free.take(worker.pid),
            self._options.is_half_scale,
        )
        return Assigned(job, (slide, indices), self._options.decode_timeout_s)
