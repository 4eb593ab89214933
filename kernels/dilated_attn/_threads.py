"""Coarse parallelism on the CPU: independent tasks on threads, every torch operation on one.

Attention in blocks is thousands of short operations. Threads that share each of them meet at the
end of each, and on a busy machine wait there for the scheduler; threads with tasks of their own
meet once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

Task = Callable[[], None]


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return workers whose operations use one thread each. A forked process gets its own."""
    started = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=f"modaltune-{process}")

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # both settings are the thread's own
        started.wait()

    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # new threads of others start with the last number set
    return pool


def run_tasks(tasks: Sequence[Task]) -> None:
    """Run tasks that touch nothing in common, on as many threads as torch uses here."""
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    inference = torch.is_inference_mode_enabled()  # a thread's own setting, too

    def run(task: Task) -> None:
        # Leaving inference mode turns gradients on, whatever the thread was started with.
        with torch.inference_mode(inference), torch.no_grad():
            task()

    running = [_pool(threads, os.getpid()).submit(run, task) for task in tasks]
    for done in running:
        done.result()
