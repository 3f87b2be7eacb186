"""Worker processes: one a core, one thread each, none outliving the run that started it."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from export.parent import end_with_parent


def workers(each: int = 1, begin: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Return a pool of one process a core, each computing on one thread.

    Two one-thread processes use two cores better than one process of two threads does.

    Args:
        each: How many processes a job starts for itself; there are fewer jobs at a time then.
        begin: Called once in each process; it must not fail.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["export.run"])  # once, not in each process: it takes seconds
    jobs = max(1, (os.cpu_count() or 1) // each)
    return ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(begin,))


def _begin(begin: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    end_with_parent()
    if begin:
        begin()
