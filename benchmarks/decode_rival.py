"""One rival reader as a process: takes jobs as JSON lines, times itself, and answers in JSON lines.

Runs in the rival's own environment, which need not have this package: it imports none of it. A job
names a slide, tiles and the size they are delivered at, and either times reading them all with the
given number of workers, or saves them. Rivals of one thread work in that many processes, each on
its share of the tiles, and keep the pixels to themselves: handing them over is not charged to them.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Rgb = npt.NDArray[np.uint8]
Tiles = Iterator[tuple[int, Rgb]]
_BATCH = 16
_KEPT = 64


def fitted(region: Rgb, tile_px: int) -> Rgb:
    """Average a square region by area to the tile's size."""
    if region.shape[0] == tile_px:
        return region
    import cv2

    return np.asarray(cv2.resize(region, (tile_px, tile_px), interpolation=cv2.INTER_AREA))


def cucim_tiles(job: dict[str, Any]) -> Tiles:
    """Raw cuCIM: its batch iterator with its own worker threads; views of its buffers."""
    cucim: Any = importlib.import_module("cucim")
    image = cucim.CuImage(job["path"])
    side = job["read_px"]
    batches = image.read_region(
        [tuple(c) for c in job["coords"]], (side, side), 0,
        num_workers=job["workers"], batch_size=_BATCH,
    )  # fmt: skip
    count = 0
    for batch in batches:
        for region in np.asarray(batch).reshape(-1, side, side, 3):
            yield count, fitted(region, job["tile_px"])
            count += 1


def hs2p_tiles(job: dict[str, Any], supertiles: tuple[int, ...]) -> Tiles:
    """Tiles as hs2p streams them from its cuCIM reader, in super-tiles or one by one."""
    from hs2p.wsi.streaming.stream import iter_tile_records_from_result

    coords = np.array(job["coords"])
    result = SimpleNamespace(
        image_path=job["path"], backend="cucim", x=coords[:, 0], y=coords[:, 1],
        num_tiles=len(coords), read_level=0, read_tile_size_px=job["read_px"],
        tile_size_lv0=job["read_px"], step_px_lv0=job["read_px"], overlap=0.0,
        level_downsamples=[(1.0, 1.0)], base_spacing_um=job["base_mpp"],
    )  # fmt: skip
    for record in iter_tile_records_from_result(
        result=result, num_workers=job["workers"], supertile_sizes=supertiles
    ):
        yield record.tile_index, fitted(record.tile_arr, job["tile_px"])


def single_tiles(read: Callable[[int, int, int], Rgb], job: dict[str, Any]) -> Tiles:
    """Tiles of a library that reads one region at a time."""
    for index, (x, y) in enumerate(job["coords"]):
        yield index, fitted(read(x, y, job["read_px"]), job["tile_px"])


def openslide_tiles(job: dict[str, Any]) -> Tiles:
    """OpenSlide through openslide-python."""
    import openslide

    slide = openslide.OpenSlide(job["path"])
    return single_tiles(
        lambda x, y, side: np.asarray(slide.read_region((x, y), 0, (side, side)))[..., :3], job
    )


def tiffslide_tiles(job: dict[str, Any]) -> Tiles:
    """The tiffslide reader: tifffile and zarr in Python."""
    import tiffslide

    slide = tiffslide.TiffSlide(job["path"])
    return single_tiles(
        lambda x, y, side: slide.read_region((x, y), 0, (side, side), as_array=True), job
    )


def fastslide_tiles(job: dict[str, Any]) -> Tiles:
    """The fastslide reader."""
    import fastslide

    slide = fastslide.FastSlide.from_file_path(job["path"])
    return single_tiles(
        lambda x, y, side: slide.read_region((x, y), 0, (side, side)).numpy()[..., :3], job
    )


READERS: dict[str, tuple[str, bool, Callable[[dict[str, Any]], Tiles]]] = {
    # Name: its module, whether it has workers of its own, and its tiles.
    "cucim": ("cucim", True, cucim_tiles),
    "hs2p-groups": ("hs2p", True, lambda job: hs2p_tiles(job, (8, 4, 2))),
    "hs2p-single": ("hs2p", True, lambda job: hs2p_tiles(job, ())),
    "openslide": ("openslide", False, openslide_tiles),
    "tiffslide": ("tiffslide", False, tiffslide_tiles),
    "fastslide": ("fastslide", False, fastslide_tiles),
}


def consume(name: str, job: dict[str, Any]) -> float:
    """Read all tiles of a job into a small ring; return seconds."""
    ring = np.zeros((_KEPT, job["tile_px"], job["tile_px"], 3), dtype=np.uint8)
    _, has_workers, tiles = READERS[name]
    start = time.perf_counter()
    for index, tile in tiles(job):
        if has_workers:
            ring[index % _KEPT, 0] = tile[0]  # its own memory: looked at, not copied
        else:
            ring[index % _KEPT] = tile
    return time.perf_counter() - start


def serve_share(name: str, connection: Any) -> None:
    """Time jobs in a process of its own."""
    while (job := connection.recv()) is not None:
        connection.send(consume(name, job))


def main(name: str) -> None:
    """Answer jobs from standard input until it closes."""
    module, has_workers, tiles = READERS[name]
    try:
        version = str(getattr(__import__(module), "__version__", "unknown"))
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    print(json.dumps({"version": version}), flush=True)
    shares: list[Any] = []
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, Any]
        try:
            if "save" in job:
                found = dict(tiles(job))
                np.save(job["save"], np.stack([found[i] for i in range(len(found))]))
                answer = {"saved": len(found)}
            elif has_workers:
                answer = {"seconds": consume(name, job)}
            else:
                while len(shares) < job["workers"]:
                    ours, theirs = multiprocessing.get_context("spawn").Pipe()
                    multiprocessing.get_context("spawn").Process(
                        target=serve_share, args=(name, theirs), daemon=True
                    ).start()
                    shares.append(ours)
                answer = {"seconds": timed_shares(job, shares[: job["workers"]])}
        except Exception as error:  # a rival that fails is reported, not timed
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), flush=True)


def timed_shares(job: dict[str, Any], shares: list[Any]) -> float:
    """Split a job over processes in bands of rows; return the longest share's seconds."""
    parts = np.array_split(np.array(job["coords"]), len(shares))
    for connection, part in zip(shares, parts, strict=True):
        connection.send({**job, "coords": part.tolist()})
    return max(float(connection.recv()) for connection in shares)


if __name__ == "__main__":
    main(sys.argv[1])
