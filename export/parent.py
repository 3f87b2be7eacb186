"""What no process does by itself: to end when the one that started it was killed."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Let this process end when its parent does; called in one that multiprocessing started.

    A killed parent cannot stop its children. What they went on to write would be in the way of the
    run that goes on, and what they compute takes time from what it measures.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
