"""One side of the whole-model benchmark in a process of its own, asked line by line.

So neither side's memory, threads or kept copies are in the other's way, and a side that the system
kills for its memory is an error of the benchmark, not its end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modaltune.benchmarks.model_sides import Workload


class Worker:
    """A process that builds one side and answers questions about it.

    Args:
        side: `ours` or `literal`.
        work: What it computes.
    """

    def __init__(self, side: str, work: Workload) -> None:
        code = "from modaltune.benchmarks.model_worker import serve; serve()"
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, side, json.dumps(work.to_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Send a question and wait for its answer.

        Raises:
            RuntimeError: The process failed; what it said is on stderr.
        """
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        if pipe_in is None or pipe_out is None:
            raise RuntimeError("the worker has no pipes")
        try:
            pipe_in.write(json.dumps({"question": question, **arguments}) + "\n")
            pipe_in.flush()
            for line in pipe_out:
                if line.startswith('{"answer":'):
                    found: dict[str, Any] = json.loads(line)["answer"]
                    return found
        except BrokenPipeError:
            pass  # it has ended: said below
        code = self._process.wait()
        killed = " (killed: out of memory?)" if code == -9 else ""
        raise RuntimeError(f"the {self.side} side ended with exit code {code}{killed}")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve() -> None:
    """Build the side named by the arguments and answer until standard input ends."""
    from modaltune.benchmarks.model_sides import SIDES

    side = SIDES[sys.argv[1]](Workload(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        asked = json.loads(line)
        answer = QUESTIONS[asked.pop("question")](side, **asked)
        sys.stdout.write('{"answer": ' + json.dumps(answer) + "}\n")
        sys.stdout.flush()


def _warm(side: Any) -> dict[str, Any]:
    """Load libraries, keep copies of weights, allocate the optimiser's state: on a small case."""
    from modaltune.benchmarks.model_sides import WARM_TILES

    side.run(min(WARM_TILES, side.work.tiles))
    return {}


def _time(side: Any) -> dict[str, Any]:
    started, cpu_started = time.perf_counter(), time.process_time()
    side.run()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def _answers(side: Any, path: str) -> dict[str, Any]:
    """Run once and write the embeddings, and in training every gradient, to a file."""
    from safetensors.torch import save_file

    found = {"out": side.run().clone()}
    if side.work.mode == "train":
        found |= {f"grad/{name}": grad for name, grad in side.gradients().items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path)
    return {}


def _peak(side: Any) -> dict[str, Any]:
    """Return the resident memory that a run needs beyond what was there before, in bytes."""
    gc.collect()
    if side.work.where == "cuda":
        return {"bytes": _gpu_peak(side)}
    is_reset = _reset_peak()
    before = _resident("VmRSS")
    side.run()
    return {"bytes": max(0, _resident("VmHWM") - before) if is_reset else None}


def _gpu_peak(side: Any) -> int:
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.run()
    return torch.cuda.max_memory_allocated() - before


def _reset_peak() -> bool:
    """Give free pages back and start the peak of resident memory anew (Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _rates(side: Any) -> dict[str, Any]:
    from dataclasses import asdict

    import torch

    from modaltune.machine_limits import measure_gpu_rates, measure_rates

    work, training = side.work, side.work.mode == "train"
    if work.where == "cuda":
        return asdict(measure_gpu_rates(getattr(torch, work.precision), training=training))
    return asdict(measure_rates(training=training))


def _profile(side: Any) -> dict[str, Any]:
    from modaltune.profiling import profile_run

    found = profile_run(side.run, device=side.work.where, warmup=0)
    return {row.stage: row.seconds for row in found.stages}


def _facts(side: Any) -> dict[str, Any]:
    """Return the work to be done, and with what."""
    import torch

    from modaltune.engine.device import device_facts
    from modaltune.kernels import packed_bytes, product_choice
    from modaltune.model_flops import count_flops

    work = side.work
    on_gpu = work.where == "cuda"
    flops = count_flops(side.model, [work.tiles], tasks=work.tasks, training=work.mode == "train")
    return {
        "products": sum(one.products for one in flops.values()),
        "attention": sum(one.attention for one in flops.values()),
        "library": "torch" if on_gpu else product_choice().library,
        "packed_bytes": 0 if on_gpu else packed_bytes(),
        "name": device_facts(work.where).name if on_gpu else None,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "warm": _warm,
    "time": _time,
    "answers": _answers,
    "peak": _peak,
    "rates": _rates,
    "profile": _profile,
    "facts": _facts,
}
