"""What goes wrong while decoding costs one slide, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile

from modaltune.engine.decode import (
    DecodeError,
    DecodeEvent,
    DecodeOptions,
    SlideDone,
    SlideFailed,
    SlideFound,
    SlideRequest,
    TileBlock,
    TileDecoder,
    TileOptions,
)
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.tiling import TileGrid

Rgb = npt.NDArray[np.uint8]
TILES = TileOptions(tile_px=64)
SIDE = 1024
WAIT_S = 60.0


def picture(side: int = SIDE) -> Rgb:
    noise = np.random.default_rng(1).integers(0, 200, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC))


def whole_grid(side: int = SIDE) -> TileGrid:
    """Every tile of 64 px of a slide at 0.5 mpp."""
    places = np.arange(0, side - 63, 64, dtype=np.int64)
    x, y = np.meshgrid(places, places)
    coords = np.stack([x.ravel(), y.ravel()], axis=1)
    return TileGrid(
        coords=coords,
        tile_px=64,
        mpp=0.5,
        base_mpp=0.5,
        level=0,
        read_px=64,
        tile_px_level0=64,
        foreground=np.ones(len(coords), dtype=np.float32),
        dimensions=(side, side),
        shape=(len(places), len(places)),
    )


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tif", picture(), mpp=0.5, tile_px=128, compression="lzw")


def request(key: str, path: Path) -> SlideRequest:
    return SlideRequest(key, path, grid=whole_grid())


def drain(decoder: TileDecoder) -> dict[str, DecodeEvent]:
    """Take all events; return how each slide ended, with its tiles counted."""
    ends: dict[str, DecodeEvent] = {}
    tiles: dict[str, int] = {}
    while decoder.in_progress:
        event = decoder.next_event(WAIT_S)
        if isinstance(event, TileBlock):
            with event:
                assert event.key not in ends
                tiles[event.key] = tiles.get(event.key, 0) + len(event)
        elif isinstance(event, SlideDone | SlideFailed):
            ends[event.key] = event
            if isinstance(event, SlideDone):
                assert tiles.get(event.key, 0) == event.tiles == 256
    return ends


def end_of(decoder: TileDecoder) -> list[DecodeEvent]:
    """Take all events without counting tiles; return the ends."""
    ends = []
    while decoder.in_progress:
        event = decoder.next_event(WAIT_S)
        if isinstance(event, TileBlock):
            event.release()
        else:
            ends.append(event)
    return ends


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody waits for has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until something holds; fail when it does not in time."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def stop_all(decoder: TileDecoder, number: signal.Signals) -> tuple[int, ...]:
    """Send each worker a signal; return their ids."""
    pids = decoder.pids
    for pid in pids:
        os.kill(pid, number)
    return pids


def ready_decoder(slide: Path, **options: float) -> TileDecoder:
    """A decoder whose one worker has served a slide."""
    decoder = TileDecoder(
        DecodeOptions(TILES, workers=1, block_tiles=16, **options)  # type: ignore[arg-type]
    )
    decoder.submit(request("warm", slide))
    assert isinstance(drain(decoder)["warm"], SlideDone)
    return decoder


def test_a_worker_that_hangs_is_replaced(slide: Path) -> None:
    with ready_decoder(slide, decode_timeout_s=1.0, survey_timeout_s=1.0) as decoder:
        (pid,) = stop_all(decoder, signal.SIGSTOP)
        for key in ("a", "b", "c"):
            decoder.submit(request(key, slide))
        ends = drain(decoder)
        failed = [event for event in ends.values() if isinstance(event, SlideFailed)]
        assert [event.key for event in failed] == ["a"]
        assert "took longer than 1 s and was ended" in failed[0].reason
        assert str(slide) in failed[0].reason
        assert is_gone(pid)
        assert pid not in decoder.pids


def test_a_worker_that_is_killed_is_replaced(slide: Path) -> None:
    with ready_decoder(slide) as decoder:
        # Stopped first, so that it has work in hand when it dies.
        (pid,) = stop_all(decoder, signal.SIGSTOP)
        for key in ("a", "b", "c"):
            decoder.submit(request(key, slide))
        with pytest.raises(TimeoutError):
            decoder.next_event(0.2)
        os.kill(pid, signal.SIGKILL)
        ends = drain(decoder)
        failed = [event for event in ends.values() if isinstance(event, SlideFailed)]
        assert [event.key for event in failed] == ["a"]
        assert "died with signal SIGKILL" in failed[0].reason
        assert isinstance(ends["b"], SlideDone)


def test_the_last_block_does_not_wait_behind_another(slide: Path) -> None:
    """Two workers, one stopped: it holds back its own block only; the last two come in halves."""
    with TileDecoder(DecodeOptions(TILES, workers=2, block_tiles=64)) as decoder:
        wait_until(lambda: len(decoder.ready_pids) == 2)
        decoder.submit(request("warm", slide))
        drain(decoder)
        first, second = decoder.ready_pids
        os.kill(second, signal.SIGSTOP)
        decoder.submit(request("a", slide))
        assert isinstance(decoder.next_event(WAIT_S), SlideFound)
        sizes = []
        while sum(sizes) < 3 * 64:
            block = decoder.next_event(WAIT_S)
            assert isinstance(block, TileBlock)
            sizes.append(len(block))
            block.release()
        assert sizes == [64, 32, 32, 16, 16, 16, 16]
        os.kill(second, signal.SIGCONT)
        (end,) = end_of(decoder)
        assert isinstance(end, SlideDone)
        assert decoder.ready_pids == (first, second)


def test_an_idle_worker_that_dies_costs_nothing(slide: Path) -> None:
    with ready_decoder(slide) as decoder:
        (pid,) = stop_all(decoder, signal.SIGKILL)
        wait_until(lambda: pid not in decoder.pids and len(decoder.pids) == 1)
        decoder.submit(request("a", slide))
        assert isinstance(drain(decoder)["a"], SlideDone)


def test_workers_are_added_while_the_consumer_waits(
    slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers or more at first; stopped ones look busy for ever, so others are started."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    with TileDecoder(DecodeOptions(TILES, block_tiles=16)) as decoder:
        turns = itertools.count()
        while not decoder.ready_pids or decoder.ready_pids != decoder.pids:
            decoder.submit(request(f"warm {next(turns)}", slide))
            drain(decoder)
        stopped = stop_all(decoder, signal.SIGSTOP)
        for key in "abcdefghijklmnopqr":  # more than there can be workers
            decoder.submit(request(key, slide))
        # The stopped ones hold a job or two each; a new one has the rest to itself.
        event = decoder.next_event(WAIT_S)
        assert set(decoder.pids) > set(stopped)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        if isinstance(event, TileBlock):
            event.release()
        ends = [event for event in end_of(decoder) if not isinstance(event, SlideFound)]
        assert all(isinstance(event, SlideDone) for event in ends)
        assert len(ends) == 18


def test_slabs_of_dead_workers_come_back(slide: Path) -> None:
    """Workers die with blocks in hand more often than there are slabs, and still a slide comes."""
    with ready_decoder(slide) as decoder:
        for turn in range(decoder.options.slabs):
            decoder.submit(request(str(turn), slide))
            kept: list[TileBlock] = []
            while len(kept) < decoder.options.slabs:
                event = decoder.next_event(WAIT_S)
                if isinstance(event, TileBlock):
                    kept.append(event)
            # Nothing is in hand now for want of slabs; what is next goes to a stopped worker.
            stop_all(decoder, signal.SIGSTOP)
            for block in kept:
                block.release()
            with pytest.raises(TimeoutError):
                decoder.next_event(0.1)
            stop_all(decoder, signal.SIGKILL)
            (end,) = end_of(decoder)
            assert isinstance(end, SlideFailed)
        decoder.submit(request("after", slide))
        assert isinstance(drain(decoder)["after"], SlideDone)


def test_a_worker_that_grows_too_large_is_ended(tmp_path: Path, slide: Path) -> None:
    """A plain image is decoded whole: 192 MB of pixels in a worker that may have 150 MB."""
    large = tmp_path / "large.png"
    PIL.Image.fromarray(np.zeros((8000, 8000, 3), dtype=np.uint8)).save(large, compress_level=1)
    with ready_decoder(slide, memory_mib=150) as decoder:
        decoder.submit(SlideRequest("large", large, 0.5))
        decoder.submit(request("a", slide))
        ends = drain(decoder)
    assert isinstance(ends["large"], SlideFailed)
    assert "took more than 150 MiB and was ended" in ends["large"].reason
    assert isinstance(ends["a"], SlideDone)


def break_file_tiles(path: Path, indices: list[int]) -> None:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in indices]
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\x55" * count)


@pytest.mark.parametrize("codec", ["deflate", "jpeg", "lzw", "jpeg2000"])
def test_a_bad_region_is_marked_and_counted(tmp_path: Path, codec: str) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", picture(), mpp=0.5, tile_px=128,
        compression=codec,  # type: ignore[arg-type]
    )  # fmt: skip
    break_file_tiles(path, [3 * 8 + 4])  # of 8 per row: four tiles of 256
    bad: list[int] = []
    with TileDecoder(DecodeOptions(TILES, workers=1, block_tiles=16, bad_share=0.02)) as decoder:
        decoder.submit(request("a", path))
        while decoder.in_progress:
            event = decoder.next_event(WAIT_S)
            if isinstance(event, TileBlock):
                with event:
                    bad += event.indices[event.is_bad].tolist()
                    assert (event.tiles[event.is_bad] == 255).all()
            elif not isinstance(event, SlideFound):
                assert isinstance(event, SlideDone)
                assert (event.tiles, event.bad_tiles) == (256, 4)
    assert sorted(bad) == [row * 16 + column for row in (6, 7) for column in (8, 9)]


@pytest.mark.parametrize(("share", "fails"), [(0.01, True), (0.02, False), (0.0, True)])
def test_too_many_bad_tiles_fail_the_slide(slide: Path, share: float, fails: bool) -> None:
    break_file_tiles(slide, [20])
    with TileDecoder(DecodeOptions(TILES, workers=1, bad_share=share)) as decoder:
        decoder.submit(request("a", slide))
        (event,) = drain(decoder).values()
    assert isinstance(event, SlideFailed) == fails
    if isinstance(event, SlideFailed):
        assert f"must be at most {100 * share:g} % of 256, got 4 so far" in event.reason


def test_one_bad_tile_of_a_small_slide_is_no_failure(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture(256), mpp=0.5, tile_px=64, compression="lzw")
    break_file_tiles(path, [5])
    with TileDecoder(DecodeOptions(TILES, workers=1)) as decoder:
        events = list(decoder.stream([SlideRequest("a", path, grid=whole_grid(256))]))
    assert isinstance(events[-1], SlideDone)
    assert (events[-1].tiles, events[-1].bad_tiles) == (16, 1)


def test_workers_that_cannot_start_are_an_error(
    monkeypatch: pytest.MonkeyPatch, slide: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with TileDecoder(DecodeOptions(TILES, workers=1)) as decoder:
        with pytest.raises(DecodeError, match="decoder processes can't start: exit code 1"):
            list(decoder.stream([request("a", slide)]))
        assert decoder.pids == ()


@contextlib.contextmanager
def run_parent(code: str, slide: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process with a decoder at work; its workers' ids are its first line."""
    start = (
        "import signal, sys\nfrom pathlib import Path\n"
        # Whoever is started in the background of a script has inherited that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from modaltune.engine.decode import *\n"
        "decoder = TileDecoder(DecodeOptions(TileOptions(tile_px=64, min_foreground=0), 2))\n"
        f"path = Path({str(slide)!r})\n"
        "events = decoder.stream(SlideRequest(str(i), path) for i in range(10**6))\n"
        "def use(event):\n"
        "    if isinstance(event, TileBlock): event.release()\n"
        "for _ in range(20): use(next(events))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


SAY = "print(*decoder.pids, flush=True)\n"
WORK_ON = SAY + "for event in events: use(event)\n"


def first_pids(parent: subprocess.Popen[str]) -> list[int]:
    assert parent.stdout is not None
    return [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(slide: Path, number: signal.Signals) -> None:
    before = set(os.listdir("/dev/shm"))
    with run_parent(WORK_ON, slide) as parent:
        pids = first_pids(parent)
        assert len(pids) == 2
        assert not any(is_gone(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait(WAIT_S)
    wait_until(lambda: all(is_gone(pid) for pid in pids))
    assert set(os.listdir("/dev/shm")) == before


def test_workers_die_with_a_parent_while_they_hang(slide: Path) -> None:
    with run_parent(WORK_ON, slide) as parent:
        pids = first_pids(parent)
        os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
        parent.wait(WAIT_S)
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_ctrl_c_ends_in_order(slide: Path) -> None:
    work_on = WORK_ON.replace("for", "    for")
    code = f"try:\n    {work_on}except KeyboardInterrupt:\n    decoder.close(); print('closed')\n"
    with run_parent(code, slide) as parent:
        pids = first_pids(parent)
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=WAIT_S)
    assert (parent.returncode, out, err) == (0, "closed\n", "")
    assert all(is_gone(pid) for pid in pids)


def test_a_script_may_end_without_closing(slide: Path) -> None:
    with run_parent(SAY + "sys.exit(3)\n", slide) as parent:
        pids = first_pids(parent)
        _, err = parent.communicate(timeout=WAIT_S)
    assert (parent.returncode, err) == (3, "")
    wait_until(lambda: all(is_gone(pid) for pid in pids))
