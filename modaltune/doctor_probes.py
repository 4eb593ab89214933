"""What `modaltune doctor` tries in child processes: load a library, make it do something small.

Children run side by side and share one deadline; what libraries print is swallowed. A child answers
with one JSON line per probe, so that a slow or crashing probe loses only itself and those after it.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Findings = dict[str, Any]

# Only a hanging library gets this far; the first import after an installation takes 15 s and more.
DEADLINE_S = 45.0
# Probes of one child run in order; the encoders' need torch, which takes seconds to load.
CHILDREN = (("torch", "encoders"), ("readers",), ("runtimes",))


def run_probes(deadline_s: float = DEADLINE_S) -> dict[str, Findings]:
    """Run every probe and return what each found.

    Args:
        deadline_s: Seconds after which the children still running are stopped.

    Returns:
        Probe name -> findings; `{"error": why, "is_slow": whether time ran out}` where it failed.
    """
    end = time.monotonic() + deadline_s
    code = "import sys; from modaltune.doctor_probes import main; main(sys.argv[1:])"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for names in CHILDREN
    ]
    found: dict[str, Findings] = {}
    for names, child in zip(CHILDREN, children, strict=True):
        found |= _collect(child, names, end)
    return found


def _collect(child: subprocess.Popen[str], names: Sequence[str], end: float) -> dict[str, Findings]:
    """Wait for a child until `end` and read its answers."""
    is_slow = False
    try:
        out, err = child.communicate(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        is_slow = True
        child.kill()
        out, err = child.communicate()
    found: dict[str, Findings] = {}
    for line in out.splitlines():
        if line.startswith('{"probe":'):
            answer = json.loads(line)
            found[answer["probe"]] = answer["found"]
    last = (err.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    slow = "took too long and was stopped; run doctor again when the machine is less busy"
    why = slow if is_slow else f"died: {last}"
    lost = {name: f"the {name} probe {why}" for name in names if name not in found}
    return found | {name: {"error": text, "is_slow": is_slow} for name, text in lost.items()}


def main(names: Sequence[str]) -> None:
    """Run probes in order and print one JSON line for each (the child's side)."""
    for name in names:
        try:
            found = PROBES[name]()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "is_slow": False}
        # A line of its own, whatever a library has printed before.
        sys.stdout.write("\n" + json.dumps({"probe": name, "found": found}) + "\n")
        sys.stdout.flush()


def _probe_torch() -> Findings:
    """Multiply two matrices, list the devices, and say whose products the CPU path takes."""
    import torch

    from modaltune.kernels import known_product_choice

    product = torch.ones(8, 8) @ torch.ones(8, 8)
    if not bool((product == 8).all()):
        raise RuntimeError("torch multiplies wrongly on this CPU")
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}{gpu.minor}",
                "memory_gib": gpu.total_memory / 2**30,
            }
        )
    products = known_product_choice()  # measuring it may take longer than a probe has
    return {
        "version": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "products": None if products is None else products.describe(),
        "cuda_build": torch.version.cuda,
        "devices": devices,
    }


def _try(action: Callable[[], str]) -> Findings:
    """Return the action's detail, or what went wrong: any failure is a finding here."""
    try:
        return {"ok": True, "detail": action()}
    except ModuleNotFoundError as error:
        return {"ok": False, "detail": f"not installed ({error.name})"}
    except Exception as error:
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


def _probe_readers() -> Findings:
    """Let each reader read a region of a small tiled TIFF and compare the pixels."""
    import numpy as np
    import tifffile

    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    x, y, side = 96, 32, 64
    expected = pixels[y : y + side, x : x + side]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.tif"
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb")

        def compare(module: str, read: Callable[[], Any]) -> str:
            got = np.asarray(read())[..., :3]
            if not np.array_equal(got, expected):
                raise ValueError("reads other pixels than were written")
            return f"{_version(module)}, reads a tiled TIFF"

        def try_cucim() -> str:
            import cucim

            image: Any = cucim.CuImage(str(path))  # type: ignore[attr-defined]
            return compare("cucim", lambda: image.read_region((x, y), (side, side)))

        def try_openslide() -> str:
            from openslide import OpenSlide

            with OpenSlide(path) as slide:
                return compare("openslide", lambda: slide.read_region((x, y), 0, (side, side)))

        def try_pillow() -> str:
            from PIL import Image

            with Image.open(path) as image:
                return compare("PIL", lambda: image.crop((x, y, x + side, y + side)))

        def try_tiff() -> str:
            return compare("tifffile", lambda: tifffile.imread(path)[y : y + side, x : x + side])

        def try_jpeg() -> str:
            import simplejpeg

            grey = np.full((16, 16, 3), 128, dtype=np.uint8)
            if not np.array_equal(simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey)), grey):
                raise ValueError("decodes other pixels than were encoded")
            return f"{_version('simplejpeg')}, decodes a JPEG tile"

        def try_deflate() -> str:
            import imagecodecs

            if bytes(imagecodecs.deflate_decode(zlib.compress(b"tile" * 9), out=36)) != b"tile" * 9:
                raise ValueError("decodes other bytes than were encoded")
            return f"{_version('imagecodecs')}, decodes a Deflate tile"

        return {
            "cuCIM": _try(try_cucim),
            "OpenSlide": _try(try_openslide),
            "Pillow": _try(try_pillow),
            "tifffile": _try(try_tiff),
            "simplejpeg": _try(try_jpeg),
            "imagecodecs": _try(try_deflate),
            "wsidicom (DICOM)": _try(lambda: _version("wsidicom")),
        }


def _probe_runtimes() -> Findings:
    """Run a one-node graph through ONNX Runtime; load TensorRT where it is installed."""

    def try_onnxruntime() -> str:
        import numpy as np
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper

        shape = [2]
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"])],
            "probe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (doubled,) = session.run(None, {"x": np.array([1.0, 2.0], dtype=np.float32)})
        if doubled.tolist() != [2.0, 4.0]:
            raise ValueError("runs a graph wrongly")
        return f"{ort.__version__} runs a graph; {', '.join(ort.get_available_providers())}"

    def try_rtx() -> str:
        names = ("tensorrt_rtx", "tensorrt_rtx_bindings")
        return _version(next((name for name in names if find_spec(name)), names[0]))

    return {
        "onnxruntime": _try(try_onnxruntime),
        "tensorrt": _try(lambda: _version("tensorrt")),
        "tensorrt-rtx": _try(try_rtx),
    }


def _probe_encoders() -> Findings:
    """List the registered tile encoders and where their weights lie on this machine."""
    from modaltune.engine.encoders.loading import describe_encoders

    return {
        one.name: {**asdict(one), "weights": None if one.weights is None else str(one.weights)}
        for one in describe_encoders()
    }


def _version(module: str) -> str:
    """Import a module and return its version; raises ImportError where it is missing."""
    return str(getattr(importlib.import_module(module), "__version__", "installed"))


PROBES: dict[str, Callable[[], Findings]] = {
    "torch": _probe_torch,
    "readers": _probe_readers,
    "runtimes": _probe_runtimes,
    "encoders": _probe_encoders,
}
