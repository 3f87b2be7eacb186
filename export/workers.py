"""Worker processes: one a core, one thread each, none outliving the run that started it."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def workers() -> ProcessPoolExecutor:
    """Return a pool of one process a core, each computing on one thread.

    Two one-thread processes use two cores better than one process of two threads does.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), spawn, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    # A killed parent cannot stop its workers, and what they went on to write would be in the way
    # of the run that goes on.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
