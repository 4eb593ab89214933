"""The decoder end to end: real processes, shared memory, several slides, back-pressure."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from modaltune.engine.decode import (
    DecodeError,
    DecodeOptions,
    SlideDone,
    SlideFailed,
    SlideFound,
    SlideRequest,
    TileBlock,
    TileDecoder,
    TileOptions,
)
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide
from modaltune.engine.tiling import TileGrid, read_tiles, tile_slide
from modaltune.engine.tissue import find_tissue

Rgb = npt.NDArray[np.uint8]
TILES = TileOptions(tile_px=64, min_foreground=0.5)
WAIT_S = 60.0


def tissue_picture(side: int, seed: int) -> Rgb:
    """Pink textured blobs on white glass."""
    rng = np.random.default_rng(seed)
    field = cv2.resize(rng.random((6, 6)).astype(np.float32), (side, side), interpolation=2)
    image = np.full((side, side, 3), 245, dtype=np.uint8)
    noise = rng.integers(-25, 25, (side, side, 3))
    inside = field > 0.4
    image[inside] = (np.array([200, 120, 170]) + noise).astype(np.uint8)[inside]
    return image


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Slides of several codecs; one is 0.25 mpp without a level at 0.5, the last is bare glass."""
    folder = tmp_path_factory.mktemp("cohort")
    paths = []
    for index, codec in enumerate(("jpeg", "deflate", "lzw", "none")):
        paths.append(
            write_pyramid(
                folder / f"s{index}.tif",
                tissue_picture(900, index),
                mpp=0.25 if index == 1 else 0.5,
                tile_px=128,
                compression=codec,  # type: ignore[arg-type]
            )
        )
    glass = np.full((700, 700, 3), 245, dtype=np.uint8)
    paths.append(write_pyramid(folder / "glass.tif", glass, mpp=0.5))
    return paths


@pytest.fixture(scope="module")
def decoder() -> Iterator[TileDecoder]:
    with TileDecoder(DecodeOptions(TILES, workers=2, block_tiles=16)) as decoder:
        yield decoder


def reference(path: Path, options: TileOptions = TILES) -> tuple[TileGrid, Rgb]:
    """Tile and read one slide in this process."""
    with open_slide(path) as slide:
        grid = tile_slide(
            slide,
            find_tissue(slide, options.tissue),
            tile_px=options.tile_px,
            mpp=options.mpp,
            min_foreground=options.min_foreground,
            overlap_px=options.overlap_px,
        )
        tiles = list(read_tiles(slide, grid))
    return grid, np.stack(tiles) if tiles else np.empty((0, 64, 64, 3), np.uint8)


def collect(decoder: TileDecoder, requests: list[SlideRequest], most: int = 16) -> dict[str, Rgb]:
    """Put the tiles of slides together, checking the order of events on the way."""
    pixels: dict[str, Rgb] = {}
    seen: dict[str, npt.NDArray[np.int64]] = {}
    over = []
    for event in decoder.stream(requests):
        if isinstance(event, SlideFound):
            assert event.key not in pixels
            count, side = len(event.survey.grid), event.survey.grid.tile_px
            pixels[event.key] = np.full((count, side, side, 3), 99, dtype=np.uint8)
            seen[event.key] = np.zeros(count, dtype=np.int64)
        elif isinstance(event, TileBlock):
            with event:
                assert len(event) <= most
                assert not event.is_bad.any()
                pixels[event.key][event.indices] = event.tiles
                seen[event.key][event.indices] += 1
        else:
            assert isinstance(event, SlideDone), event
            assert (seen[event.key] == 1).all()
            assert (event.tiles, event.bad_tiles) == (len(seen[event.key]), 0)
            over.append(event.key)
    assert sorted(over) == sorted(request.key for request in requests)
    return pixels


def last_event(decoder: TileDecoder, timeout_s: float) -> object:
    """Take events until none comes in time; return the last one."""
    event: object = None
    while True:
        try:
            event = decoder.next_event(timeout_s)
        except TimeoutError:
            return event


def test_a_cohort_has_the_pixels_of_read_tiles(decoder: TileDecoder, cohort: list[Path]) -> None:
    pixels = collect(decoder, [SlideRequest(path.stem, path) for path in cohort])
    for path in cohort:
        grid, tiles = reference(path)
        np.testing.assert_array_equal(pixels[path.stem], tiles)
        assert (len(grid) > 30) == (path.stem != "glass")


def test_facts_of_a_slide_and_its_log(
    decoder: TileDecoder,
    cohort: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="modaltune")
    overlay = tmp_path / "overlays" / "a.png"
    overlay.parent.mkdir()
    events = list(decoder.stream([SlideRequest("a", cohort[-1], overlay=overlay)]))
    found, done = events
    assert isinstance(found, SlideFound)
    assert isinstance(done, SlideDone)
    survey = found.survey
    assert (survey.reader, survey.device, survey.mpp_source) == ("cucim", "cpu", "metadata")
    assert survey.tissue_share == 0.0
    assert survey.grid.status == "empty"
    assert "no tissue found" in survey.grid.reason
    assert {"open", "mask", "overlay"} <= set(done.seconds)
    assert overlay.read_bytes().startswith(b"\x89PNG")
    assert "read by cuCIM" in caplog.text
    assert "no tiles" in caplog.text


def test_given_tiles_are_read_as_they_are(decoder: TileDecoder, cohort: list[Path]) -> None:
    grid, tiles = reference(cohort[0])
    moved = TileGrid(**{**vars(grid), "coords": grid.coords + 21})
    with open_slide(cohort[0]) as slide:
        expected = np.stack(list(read_tiles(slide, moved)))
    pixels = collect(decoder, [SlideRequest("a", cohort[0], grid=moved)])
    np.testing.assert_array_equal(pixels["a"], expected)
    assert not np.array_equal(expected, tiles)
    other = TileGrid(**{**vars(grid), "dimensions": (5, 5)})
    (event,) = decoder.stream([SlideRequest("a", cohort[0], grid=other)])
    assert isinstance(event, SlideFailed)
    assert "grid must have tiles of 64 px of s0.tif (900 x 900 px)" in event.reason


def test_a_slide_that_cannot_be_opened_costs_itself(
    decoder: TileDecoder, cohort: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tif"
    cut.write_bytes(cohort[0].read_bytes()[:-5000])
    no_mpp = write_pyramid(tmp_path / "no-mpp.tif", tissue_picture(300, 0), mpp=None)
    requests = [SlideRequest(p.stem, p) for p in (cut, cohort[0], no_mpp, tmp_path / "none.tif")]
    failed, tiles = {}, 0
    for event in decoder.stream(requests):
        if isinstance(event, SlideFailed):
            failed[event.key] = event.reason
        elif isinstance(event, TileBlock):
            with event:
                assert event.key == "s0"
                tiles += len(event)
    assert tiles == len(reference(cohort[0])[0])
    assert "truncated" in failed["cut"]
    assert "--base-mpp" in failed["no-mpp"]
    assert "existing file" in failed["none"]
    assert set(failed) == {"cut", "no-mpp", "none"}


def test_no_more_blocks_exist_than_there_are_slabs(
    decoder: TileDecoder, cohort: list[Path]
) -> None:
    """A consumer that keeps every block gets as many as fit, and the rest once it lets go."""
    slabs = decoder.options.slabs
    total = len(reference(cohort[0])[0])
    requests = [SlideRequest(str(i), cohort[0]) for i in range(4)]
    assert -(-total // 16) * 4 > slabs
    kept: list[TileBlock] = []
    tiles = 0
    for request in requests:
        decoder.submit(request)
    while len(kept) < slabs:
        event = decoder.next_event(WAIT_S)
        if isinstance(event, TileBlock):
            kept.append(event)
    assert not isinstance(last_event(decoder, 1.0), TileBlock)
    copies = [block.tiles.copy() for block in kept]
    for block, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(block.tiles, copy)
        tiles += len(block)
        block.release()
        block.release()
    while decoder.in_progress:
        event = decoder.next_event(WAIT_S)
        if isinstance(event, TileBlock):
            with event:
                tiles += len(event)
    assert tiles == 4 * total


def test_leaving_the_loop_drops_the_rest_and_the_decoder_goes_on(
    decoder: TileDecoder, cohort: list[Path]
) -> None:
    for _ in range(3):
        for event in decoder.stream(SlideRequest(str(i), cohort[0]) for i in range(50)):
            if isinstance(event, TileBlock):
                event.release()
                break
        assert decoder.in_progress == 0
    pixels = collect(decoder, [SlideRequest("a", cohort[2])])
    np.testing.assert_array_equal(pixels["a"], reference(cohort[2])[1])


def test_requests_are_taken_as_they_are_needed(decoder: TileDecoder, cohort: list[Path]) -> None:
    taken = 0

    def requests() -> Iterator[SlideRequest]:
        nonlocal taken
        for index in range(40):
            taken += 1
            yield SlideRequest(str(index), cohort[-1])

    events = decoder.stream(requests())
    next(events)
    assert taken <= decoder.options.most_workers + 3
    assert sum(isinstance(event, SlideDone) for event in events) == 40
    assert taken == 40


def test_two_slides_of_one_key_are_refused(decoder: TileDecoder, cohort: list[Path]) -> None:
    request = SlideRequest("a", cohort[0])
    with pytest.raises(InputError, match=r"key must be distinct .* got 'a' twice"):
        list(decoder.stream([request, request]))
    assert decoder.in_progress == 0


def test_workers_are_small_and_import_little() -> None:
    """What a worker imports before its first survey, and that cuCIM there brings no CuPy."""
    code = (
        "import sys, json; sys.modules['cupy'] = None; import modaltune.engine.decode_child;"
        "import cucim; print(json.dumps(sorted(m for m, v in sys.modules.items() if v)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert {"cv2", "numpy", "openslide", "cucim"} <= loaded
    assert not loaded & {
        "torch", "numba", "matplotlib", "cupy", "pandas", "scipy", "pydantic", "transformers",
    }  # fmt: skip


def test_blocks_outlive_the_decoder_and_nothing_else_does(cohort: list[Path]) -> None:
    gc.collect()  # what earlier tests left is not counted
    before = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    with TileDecoder(DecodeOptions(TILES, workers=1)) as decoder:
        kept = None
        for event in decoder.stream([SlideRequest("a", cohort[0])]):
            if isinstance(event, TileBlock) and kept is None:
                kept = event
            elif isinstance(event, TileBlock):
                event.release()
        pids = decoder.pids
        assert len(pids) == 1
        assert set(os.listdir("/dev/shm")) == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert kept is not None
    np.testing.assert_array_equal(kept.tiles, reference(cohort[0])[1][kept.indices])
    kept.release()
    decoder.close()
    with pytest.raises(InputError, match="decoder must be open to take slides"):
        decoder.submit(SlideRequest("a", cohort[0]))
    with pytest.raises(DecodeError, match="closed"):
        decoder.next_event()
    del decoder, kept, event
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_decoder_that_broke_down_says_why_whoever_asks_first(
    monkeypatch: pytest.MonkeyPatch, cohort: list[Path]
) -> None:
    """A slide that comes when the processes have failed already is not told of a closed decoder."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    others = threading.active_count()
    with TileDecoder(DecodeOptions(TILES, workers=1)) as decoder:
        while threading.active_count() > others:
            os.sched_yield()
        decoder.submit(SlideRequest("a", cohort[0]))
        with pytest.raises(DecodeError, match="decoder processes can't start: exit code 1"):
            decoder.next_event(WAIT_S)


def test_half_scale_is_an_option(cohort: list[Path], tmp_path: Path) -> None:
    smooth = cv2.GaussianBlur(tissue_picture(900, 7), (0, 0), 3)
    path = write_pyramid(tmp_path / "a.tif", smooth, mpp=0.25, tile_px=128, compression="jpeg")
    tiles = reference(path)[1].astype(int)
    with TileDecoder(DecodeOptions(TILES, workers=1, half_scale_jpeg=True, block_tiles=16)) as d:
        pixels = collect(d, [SlideRequest("a", path), SlideRequest("b", cohort[1])])
    assert 0 < np.abs(pixels["a"] - tiles).mean() < 1.5
    np.testing.assert_array_equal(pixels["b"], reference(cohort[1])[1])  # deflate: no such thing


@pytest.mark.parametrize(
    "options", [{}, {"half_scale_jpeg": True}, {"tiles": replace(TILES, reader="cucim")}]
)
def test_a_slide_that_was_mended_is_opened_anew(options: dict[str, Any], tmp_path: Path) -> None:
    """Another file of the same name, as after a copy: no worker reads the one it has open still."""
    path = tmp_path / "a.tif"
    with TileDecoder(DecodeOptions(**{"tiles": TILES, "workers": 2, **options})) as decoder:
        while len(decoder.ready_pids) < 2:
            os.sched_yield()
        for value in (90, 160, 120):
            rgb = np.full((1280, 1280, 3), value, dtype=np.uint8)
            write_pyramid(path, rgb, mpp=0.25, tile_px=128, compression="jpeg")
            pixels = collect(decoder, [SlideRequest("a", path)], most=64)
            assert np.abs(pixels["a"].astype(int) - value).max() <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"block_tiles": 0}, "block_tiles must be at least 1, got 0"),
        ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
        ({"bad_share": 1.5}, r"bad_share must be in 0\.\.1, got 1\.5"),
        ({"decode_timeout_s": 0.0}, "decode_timeout_s must be finite and > 0, got 0"),
        ({"memory_mib": -1}, "memory_mib must be finite and > 0, got -1"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DecodeOptions(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(cohort: list[Path]) -> None:
    with pytest.raises(InputError, match="device must be cpu on a machine without a GPU"):
        TileDecoder(DecodeOptions(device="cuda"))
    with pytest.raises(InputError, match="device must be cpu on a machine without a GPU"):
        open_slide(cohort[0], device="cuda")
    with pytest.raises(InputError, match="device must be cpu or cuda, got 'tpu'"):
        open_slide(cohort[0], device="tpu")  # type: ignore[arg-type]


def test_memory_follows_the_formula() -> None:
    options = DecodeOptions(workers=2)
    assert options.shared_bytes == (2 * 2 + 2) * 64 * 3 * 256**2
    assert DecodeOptions(TileOptions(tile_px=1024), workers=2).tiles_per_block == 16
    assert DecodeOptions(TileOptions(tile_px=8192), workers=2).tiles_per_block == 1
    assert 1 <= DecodeOptions().most_workers <= 16
