"""The stream: slides through processes and threads, with an encoder simple enough to check."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from modaltune import engine
from modaltune.embedding import EmbedRequest, embed_request
from modaltune.engine.cohort import SlideItem, items_from_paths
from modaltune.engine.decode import DecodeOptions, SlideRequest, TileDecoder, TileOptions
from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import DeviceMemoryError, InputError
from modaltune.engine.folder import EmbedOptions, embed_slides
from modaltune.engine.ledger_report import read_status
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.stream import SlideStream, StreamOptions

PX = 64
OPTIONS = StreamOptions(DecodeOptions(TileOptions(tile_px=PX, min_foreground=0.5), workers=2))


class CornerEncoder(TileEncoder):
    """Features of a tile: its first pixels. Counts and, where told to, fails."""

    runtime: ClassVar[str] = "corner"
    weights_sha256 = "0" * 64
    version = "1"

    def __init__(self, batch_size: int = 4, fails_on: int | None = None) -> None:
        spec = get_spec("efficientnet-lite0")
        super().__init__(spec, device=torch.device("cpu"), precision="fp32", batch_size=batch_size)
        self.fails_on = fails_on
        self.error: Exception | None = None
        self.batches: list[int] = []

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        if self.error is not None:
            raise self.error
        part = tiles[:size]
        self.batches.append(len(part))
        flat = part.reshape(len(part), -1)[:, : self.spec.width].float()
        if self.fails_on is not None:
            flat[part[:, 0, 0, 0] == self.fails_on] = torch.nan
        return flat


def write_slide(folder: Path, name: str, columns: int, rows: int, seed: int) -> Path:
    """Tissue everywhere; no two tiles begin alike."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(120, 190, (rows * PX, columns * PX, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    folder.mkdir(exist_ok=True)
    return write_pyramid(folder / f"{name}.tiff", rgb, mpp=0.5, tile_px=PX)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    sizes = [(3, 3), (9, 8), (2, 2), (5, 4), (1, 3), (7, 7)]
    return [write_slide(folder, f"s{i}", *size, seed=i) for i, size in enumerate(sizes)]


def expected(path: Path, coords: np.ndarray) -> np.ndarray:
    """What CornerEncoder gives, from tifffile's pixels."""
    import tifffile

    rgb = tifffile.imread(path, key=0)
    tiles = [rgb[y : y + PX, x : x + PX] for x, y in coords]
    return np.stack(tiles).reshape(len(tiles), -1)[:, :1280].astype(np.float32)


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def stream_threads() -> list[str]:
    ours = ("modaltune-pump", "modaltune-encode", "modaltune-decode")
    return [t.name for t in threading.enumerate() if t.name.startswith(ours)]


def test_every_slide_gets_its_own_features(slides: list[Path]) -> None:
    """Batches of 32 hold tiles of several slides; each finds its way back."""
    encoder = CornerEncoder()
    with engine.embed(slides, encoder=encoder, options=OPTIONS) as stream:
        found = {slide.key: slide for slide in stream}
        assert 0 < stream.clock.encoder_busy <= 1
    assert set(found) == {path.stem for path in slides}
    for path in slides:
        slide = found[path.stem]
        assert (slide.status, slide.request.path, slide.bad_tiles) == ("done", path, 0)
        assert slide.coords.dtype == np.int64
        np.testing.assert_array_equal(slide.features, expected(path, slide.coords))
    assert sum(len(slide.features) for slide in found.values()) == 157
    # Every pass has the encoder's size: 157 tiles and at most one batch's filling per flush.
    assert set(encoder.batches) == {4}


def test_batches_lie_in_the_blocks_they_come_from(slides: list[Path]) -> None:
    """Batches smaller than blocks are encoded without a copy, and blocks used again after them."""
    options = StreamOptions(OPTIONS.decode, batch_tiles=8)
    many = [SlideItem(path, f"{path.stem}-{turn}", "") for turn in range(6) for path in slides]
    paths = {item.slide_id: item.path for item in many}
    with engine.embed(many, encoder=CornerEncoder(), options=options) as stream:
        for slide in stream:
            np.testing.assert_array_equal(
                slide.features, expected(paths.pop(slide.key), slide.coords)
            )
    assert not paths


def test_bits_do_not_depend_on_the_company(slides: list[Path]) -> None:
    """A real encoder: slides alone and together, in batches of other sizes and orders."""
    encoder = load_encoder(runtime="onnxruntime")
    options = StreamOptions(OPTIONS.decode, batch_tiles=24)
    chosen = [slides[0], slides[2], slides[4]]
    with engine.embed(chosen, encoder=encoder, options=OPTIONS) as stream:
        together = {slide.key: slide.features for slide in stream}
    with engine.embed(reversed(chosen), encoder=encoder, options=options) as stream:
        turned = {slide.key: slide.features for slide in stream}
    for path in chosen:
        with engine.embed([path], encoder=encoder, options=options) as stream:
            (alone,) = stream
        assert np.array_equal(alone.features, together[path.stem])
        assert np.array_equal(alone.features, turned[path.stem])


def test_slides_that_fail_or_are_empty_cost_themselves_only(
    slides: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_text("not a slide")
    blank = write_pyramid(tmp_path / "blank.tiff", np.full((256, 256, 3), 255, np.uint8), mpp=0.5)
    with engine.embed([bad, blank, slides[0]], encoder=CornerEncoder(), options=OPTIONS) as stream:
        found = {slide.key: slide for slide in stream}
    assert {key: slide.status for key, slide in found.items()} == {
        "bad": "failed", "blank": "empty", "s0": "done",
    }  # fmt: skip
    assert "bad.svs" in found["bad"].reason
    assert "no tissue" in found["blank"].reason
    assert found["blank"].features.shape == (0, 1280)


def test_tiles_that_cannot_be_encoded_fail_their_slide_only(
    slides: list[Path], tmp_path: Path
) -> None:
    """One tile of one slide gives NaN, in a batch with others."""
    rgb = np.full((2 * PX, 2 * PX, 3), (150, 70, 150), dtype=np.uint8)
    rgb[0, 0, 0] = 7
    odd = write_pyramid(tmp_path / "odd.tiff", rgb, mpp=0.5, tile_px=PX)
    encoder = CornerEncoder(fails_on=7)
    with engine.embed([slides[2], odd, slides[4]], encoder=encoder, options=OPTIONS) as stream:
        found = {slide.key: slide for slide in stream}
    assert found["odd"].status == "failed"
    assert "finite" in found["odd"].reason
    for path in (slides[2], slides[4]):
        slide = found[path.stem]
        np.testing.assert_array_equal(slide.features, expected(path, slide.coords))


def test_a_fault_of_the_encoder_reaches_the_caller(slides: list[Path]) -> None:
    encoder = CornerEncoder()
    encoder.error = RuntimeError("wires crossed")
    before = children()
    with (
        pytest.raises(RuntimeError, match="wires crossed"),
        engine.embed(slides, encoder=encoder, options=OPTIONS) as stream,
    ):
        list(stream)
    assert children() == before
    assert stream_threads() == []


def test_a_device_without_memory_ends_the_run_and_costs_no_slide(
    slides: list[Path], tmp_path: Path
) -> None:
    encoder = CornerEncoder()
    encoder.error = MemoryError()
    options = EmbedOptions(tile_px=PX, min_foreground=0.5, overlays=False)
    items = items_from_paths(slides[:3])
    with pytest.raises(DeviceMemoryError, match="must fit into the memory of cpu with one tile"):
        embed_slides(items, encoder, tmp_path, options)
    (one,) = read_status(tmp_path)
    assert (one.counts["pending"], one.problems) == (3, ())
    encoder.error = None
    assert len(embed_slides(items, encoder, tmp_path, options).of("done")) == 3


def test_leaving_early_leaves_nothing_behind(slides: list[Path]) -> None:
    before, shared = children(), set(os.listdir("/dev/shm"))
    with engine.embed(slides, encoder=CornerEncoder(), options=OPTIONS) as stream:
        next(stream)
        assert children() > before
    assert list(stream) == []
    assert children() == before
    assert set(os.listdir("/dev/shm")) == shared
    assert stream_threads() == []
    stream.close()  # once more is no error


def test_slides_are_taken_as_they_are_needed(slides: list[Path], tmp_path: Path) -> None:
    """A caller that stops stops the stream: it takes what the options allow, and waits."""
    taken: list[int] = []

    def endless() -> Iterator[Path]:
        for number in range(1000):
            taken.append(number)
            link = tmp_path / f"copy-{number}.tiff"
            link.symlink_to(slides[4])
            yield link

    with engine.embed(endless(), encoder=CornerEncoder(), options=OPTIONS) as stream:
        next(stream)
        deadline, seen = time.monotonic() + 20, -1
        while len(taken) != seen and time.monotonic() < deadline:
            seen = len(taken)
            gc.collect()
            threading.Event().wait(1.0)
        assert len(taken) == seen
        assert len(taken) == OPTIONS.most_slides + 1  # one has been handed over
        assert next(stream).status == "done"


def test_two_slides_of_one_name_are_refused(slides: list[Path]) -> None:
    with (
        pytest.raises(InputError, match="key must be distinct"),
        engine.embed([slides[1], slides[1]], encoder=CornerEncoder(), options=OPTIONS) as stream,
    ):
        list(stream)


class SlowEncoder(CornerEncoder):
    """Takes a second for each pass, and says when the first began."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        self.begun.set()
        threading.Event().wait(1.0)
        return super()._run(tiles, size)


class Again:
    """A source that gives its slide once more when its tiles are all with the encoder."""

    def __init__(self, path: Path, encoder: SlowEncoder) -> None:
        self.request, self.encoder = SlideRequest("same", path), encoder
        self.turns, self.left = 0, 2

    def take(self) -> SlideRequest | None:
        self.turns += self.encoder.begun.is_set()
        # Some turns after the encoder began, the stream knows that no tile follows.
        if self.left == 2 or (self.left == 1 and self.turns > 10):
            self.left -= 1
            return self.request
        return None

    def is_ended(self) -> bool:
        return not self.left


def test_a_name_is_taken_until_its_slide_is_encoded(slides: list[Path]) -> None:
    encoder = SlowEncoder()
    with (
        pytest.raises(InputError, match=r"key must be distinct .* got 'same' twice"),
        SlideStream(Again(slides[4], encoder), encoder, OPTIONS) as stream,
    ):
        list(stream)


class Waiting:
    """A source that has its second slide only after the first has come out."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.done = list(paths), 0
        self.asked = 0

    def take(self) -> SlideRequest | None:
        if not self.paths or self.asked > self.done:
            return None
        self.asked += 1
        path = self.paths.pop(0)
        return SlideRequest(path.stem, path)

    def is_ended(self) -> bool:
        return not self.paths and self.asked == self.done


def test_a_source_may_have_nothing_for_a_while(slides: list[Path]) -> None:
    """Tiles that don't fill a batch are encoded all the same once nothing else comes."""
    source = Waiting([slides[4], slides[2], slides[0]])
    with SlideStream(source, CornerEncoder(), OPTIONS) as stream:
        keys = []
        for slide in stream:
            keys.append(slide.key)
            source.done += 1
    assert keys == ["s4", "s2", "s0"]


@pytest.mark.parametrize("given", [{"batch_tiles": 0}, {"finished_ahead": 0}])
def test_options_out_of_range(given: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"must be at least 1, got 0"):
        StreamOptions(**given)


def has_numba(pid: int) -> bool:
    """Whether a process has loaded the compiler of tissue masks."""
    return "llvmlite" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def test_a_decoder_may_run_before_the_stream(slides: list[Path]) -> None:
    """Warmed up, its first worker has loaded what finds tissue before there is a slide."""
    decoder = TileDecoder(OPTIONS.decode, is_warmed_up=True)
    deadline = time.monotonic() + 60
    while not [pid for pid in decoder.pids if has_numba(pid)]:
        assert time.monotonic() < deadline
        os.sched_yield()
    source = Waiting(slides[:1])
    with SlideStream(source, CornerEncoder(), OPTIONS, decoder=decoder) as stream:
        assert next(stream).status == "done"
    assert decoder.pids == ()
    with (
        TileDecoder(DecodeOptions(workers=1)) as other,
        pytest.raises(InputError, match="decoder must have the stream's options"),
    ):
        SlideStream(source, CornerEncoder(), OPTIONS, decoder=other)


def test_slides_one_by_one_are_surveyed_by_one_worker(slides: list[Path]) -> None:
    """A worker that has found tissue once does so again; the others need not load what it takes."""
    source = Waiting(slides[:4])
    decoder = TileDecoder(OPTIONS.decode)
    with SlideStream(source, CornerEncoder(), OPTIONS, decoder=decoder) as stream:
        for done in range(4):
            assert next(stream).status == "done"
            if done == 3:
                assert len(decoder.pids) == 2
                assert sum(map(has_numba, decoder.pids)) == 1
            source.done += 1


def test_a_command_without_its_encoder_leaves_no_decoder(
    tmp_path: Path, slides: list[Path]
) -> None:
    before = children()
    request = EmbedRequest(
        (slides[0],), out=tmp_path / "out", tile_encoder_weights=tmp_path / "none.pth"
    )
    with pytest.raises(InputError, match="--tile-encoder-weights must be an existing file"):
        embed_request(request)
    assert children() == before
    assert not (tmp_path / "out").exists()
