"""A rival pipeline as a process: two slides to features, as its documentation says.

Runs in the rival's own environment, which need not have this package: it imports none of it. The
job, a JSON file, names the tool, the encoder inside it and how many workers it may use. A small
slide comes first, so that whatever is made once is there; the answer, another file, says how long
the second one took.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Features = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
TILE_PX, MPP = 256, 0.5
# What the encoder that does nothing returns: some pixels of the tile, in 0..255.
NULL_ROWS, NULL_COLUMNS = (0, 77, 255), (0, 130, 255)


class Network(nn.Module):
    """The encoder in eager PyTorch, on the middle of normalised tiles."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        import timm
        from safetensors.torch import load_file

        self.network = timm.create_model(job["architecture"], pretrained=False, num_classes=0)
        self.network.load_state_dict(load_file(job["weights"]), strict=True)
        self.margin = (TILE_PX - job["input_px"]) // 2
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `[n, width]` for normalised `[n, 3, h, w]` of tiles or their middle."""
        side = pixels.shape[-1]
        margin = self.margin if side == TILE_PX else 0
        middle = pixels[..., margin : side - margin, margin : side - margin]
        out: Tensor = self.network(middle)
        return out


class Session(nn.Module):
    """ModalTune's ONNX Runtime session, run as ModalTune runs it: some tiles per thread.

    Takes normalised pixels, or where the graph does that itself, bytes.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["layout"]["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.session = onnxruntime.InferenceSession(
            job["graph"], options, providers=["CPUExecutionProvider"]
        )
        self.given = self.session.get_inputs()[0].name
        self.margin = (TILE_PX - job["input_px"]) // 2 if self.given == "pixels" else 0
        self.batch = job["layout"]["batch_size"]
        self.pool = ThreadPoolExecutor(job["layout"]["workers"])

    def _run(self, piece: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        out: npt.NDArray[np.float32] = self.session.run(
            None, {self.given: np.ascontiguousarray(piece)}
        )[0]
        return out

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `[n, width]` for `[n, 3, h, w]` float32 or `[n, h, w, 3]` uint8."""
        whole = pixels.numpy()
        if self.margin:
            whole = whole[..., self.margin : -self.margin, self.margin : -self.margin]
        pieces = [whole[at : at + self.batch] for at in range(0, len(whole), self.batch)]
        return torch.from_numpy(np.concatenate(list(self.pool.map(self._run, pieces))))


class Null(nn.Module):
    """An encoder that costs nothing: a few pixels are its features."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `[n, 27]` for `[n, 3, h, w]` in 0..1, or `[n, h, w, 3]` uint8."""
        if pixels.dtype == torch.uint8:
            return null_features(pixels.numpy())
        return null_features((255 * pixels).permute(0, 2, 3, 1).numpy())


def null_features(tiles: npt.NDArray[Any]) -> Tensor:
    """Return some pixels of tiles `[n, h, w, 3]`, float32 `[n, 27]`."""
    some = tiles[:, NULL_ROWS][:, :, NULL_COLUMNS]
    return torch.from_numpy(some.reshape(len(tiles), -1).astype(np.float32))


ENCODERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "torch": Network,
    "session": Session,
    "null": lambda _: Null(),
}


def prepare_slide2vec(job: dict[str, Any]) -> Callable[[str], Features]:
    """Slide2vec: a local encoder is registered and embeds the slide into a folder."""
    import slide2vec
    from hs2p.configs import DEFAULT_MASK_SAMPLING, PreviewConfig, TilingConfig
    from torchvision.transforms import v2

    network = ENCODERS[job["encoder"]](job)
    steps: list[Any] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if job["encoder"] != "null":
        steps.append(v2.Normalize(job["mean"], job["std"]))

    @slide2vec.register_encoder(
        "local-benchmark",
        encode_dim=job["width"],
        input_size=TILE_PX,
        supports_variable_input_size=False,
        supported_spacing_um=MPP,
        precision="fp32",
    )
    class Local(slide2vec.TorchTileEncoder):  # type: ignore[misc, name-defined, unused-ignore]
        """The encoder as slide2vec wants it."""

        def __init__(self, *, output_variant: str | None = None) -> None:
            super().__init__(
                network, encode_dim=job["width"], input_size=TILE_PX, mean=job["mean"],
                std=job["std"], output_variant=output_variant,
            )  # fmt: skip

        def get_normalization_transform(self) -> Any:
            """Bytes to what the encoder takes; the steps that slide2vec does by the batch."""
            return v2.Compose(steps)

    from dataclasses import replace

    masks = replace(DEFAULT_MASK_SAMPLING, min_coverage={"tissue": job["min_foreground"]})
    preprocessing = slide2vec.PreprocessingConfig(
        tiling=TilingConfig(
            requested_spacing_um=MPP, requested_tile_size_px=TILE_PX, tolerance=0.05, overlap=0.0
        ),
        masks=masks,
        preview=PreviewConfig(save_mask_preview=False, save_tiling_preview=False),
        **({"num_cucim_workers": job["workers"]} if job["workers"] else {}),
    )
    execution = slide2vec.ExecutionOptions(output_dir=Path(job["out"]), precision="fp32")
    model = slide2vec.Model.from_preset("local-benchmark", device="cpu")

    def work(slide: str) -> Features:
        found = model.embed_slide(slide, preprocessing=preprocessing, execution=execution)
        coords = np.stack([np.asarray(found.x), np.asarray(found.y)], axis=1)
        return found.tile_embeddings.float().numpy(), coords.astype(np.int64)

    return work


class Normalised:
    """Bytes of a tile to the normalised middle of it, with torchvision."""

    def __init__(self, job: dict[str, Any]) -> None:
        from torchvision.transforms import v2

        self.steps = v2.Compose(
            [
                v2.ToImage(),
                v2.CenterCrop(job["input_px"]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(job["mean"], job["std"]),
            ]
        )

    def __call__(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """Return `[3, p, p]`."""
        out: Tensor = self.steps(tile)
        return out


def prepare_lazyslide(job: dict[str, Any]) -> Callable[[str], Features]:
    """LazySlide: tissue, tiles, features; they stay in memory."""
    zs: Any = importlib.import_module("lazyslide")
    open_wsi: Any = importlib.import_module("wsidata").open_wsi
    network = ENCODERS[job["encoder"]](job)
    # Sessions and the encoder that does nothing take the tile's bytes as they are.
    transform = Normalised(job) if job["encoder"] == "torch" else torch.from_numpy

    def work(slide: str) -> Features:
        wsi = open_wsi(slide, store=None)
        zs.pp.find_tissues(wsi)
        # The outline of a slide that is all tissue lies inside its edge: by it, tiles would be
        # others, and fewer.
        zs.pp.tile_tissues(wsi, TILE_PX, mpp=MPP, slide_mpp=MPP, tissue_key=None)
        features = zs.tl.feature_extraction(
            wsi, network, model_name="local", transform=transform, device="cpu",
            return_features=True, pbar=False, **({"num_workers": job["workers"]}),
        )  # fmt: skip
        corners = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
        return np.asarray(features, dtype=np.float32), corners.round().astype(np.int64)

    return work


TOOLS: dict[str, tuple[str, Callable[[dict[str, Any]], Callable[[str], Features]]]] = {
    "slide2vec": ("slide2vec", prepare_slide2vec),
    "lazyslide": ("lazyslide", prepare_lazyslide),
}


def main(path: str) -> None:
    """Do the job of a file."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    module, prepare = TOOLS[job["tool"]]
    work = prepare(job)
    work(job["small_slide"])
    start = time.monotonic()
    features, coords = work(job["slide"])
    seconds = time.monotonic() - start
    if job["save"]:
        np.savez(job["save"], features=features, coords=coords)
    version = str(getattr(importlib.import_module(module), "__version__", "unknown"))
    answer = {"seconds": seconds, "tiles": len(coords), "version": version}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
