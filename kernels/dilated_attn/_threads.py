"""Coarse parallelism on the CPU: independent tasks on threads, every torch operation on one.

Attention in blocks is thousands of short operations. Threads that share each of them meet at the
end of each, and on a busy machine wait there for the scheduler; threads with tasks of their own
meet once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

Task = Callable[[], None]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return workers whose operations use one thread each."""
    started = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="modaltune-kernels")

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
    running = [_pool(threads).submit(task) for task in tasks]
    for done in running:
        done.result()
