"""Work that may take its process with it: what was done before is kept, what follows goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.turns import Row, in_child
from edge_ser.errors import DeviceError, EdgeSerError, MissingDependency
from export.parent import end_with_parent

ENDING_S = 30.0
"""What a process that has told all gets to end by itself: drivers take their time, or hang."""


def each(function: Callable[[Any], Row], items: Sequence[Any], longest_s: float) -> Iterator[Row]:
    """Yield what a function makes of each item, or why it makes nothing, as soon as it is known.

    One process does all, until an item fails: what a driver left behind must not disturb the next,
    so that begins in a new one.

    Args:
        function: Takes an item; runs in other processes.
        items: In their order.
        longest_s: What takes longer for one item is given up.
    """
    done = 0
    while done < len(items):
        here, there = get_context("spawn").Pipe(duplex=False)
        target = get_context("spawn").Process(
            target=_work, args=(there, function, items[done:]), daemon=True
        )
        target.start()
        there.close()
        more = True
        try:
            while more:
                row, more = _next(here, target, longest_s)
                done += 1
                yield row
        finally:
            if not more:
                target.join(ENDING_S)
            target.kill()  # if it still hangs, or nobody asks any more
            target.join()
            here.close()


def _next(here: Connection, process: Any, longest_s: float) -> tuple[Row, bool]:
    """Return what is told of the next item, and whether the process goes on with another."""
    if not here.poll(longest_s):
        process.kill()
        return {"not_measured": f"given up after {longest_s:g} s"}, False
    try:
        row, more = here.recv()
        return row, more
    except EOFError:
        process.join()
        return {"not_measured": _death(process.exitcode)}, False


def _work(there: Connection, function: Callable[[Any], Row], items: Sequence[Any]) -> None:
    """Tell of each item, and whether another follows here. What the process runs."""
    end_with_parent()
    for number, item in enumerate(items, start=1):
        more = number < len(items)
        try:
            there.send((function(item), more))
        except (DeviceError, MissingDependency) as exc:  # before anything was begun on the GPU
            there.send(({"not_measured": first_line(exc)}, more))
        except Exception as exc:  # that it fails is a result, whatever it says
            there.send(({"not_measured": first_line(exc)}, False))
            return


def _death(status: int) -> str:
    if status < 0:
        return f"its process died of {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def alone(function: Callable[..., Any], *args: object) -> Any:
    """Return what a function returns in a process of its own.

    Raises:
        EdgeSerError: The first line of what it raised, or that its process died.
    """
    try:
        return in_child(function, *args)
    except BrokenProcessPool as exc:
        raise EdgeSerError("its process died; is the memory full?") from exc
    except Exception as exc:  # whatever it says; the caller says it in the place of a result
        raise EdgeSerError(first_line(exc)) from exc


def first_line(exc: BaseException) -> str:
    """Return the first line of an error, with its kind where that is not ours."""
    line = str(exc).strip().partition("\n")[0]
    ours = isinstance(exc, (EdgeSerError, ImportError))
    return line if ours else f"{type(exc).__name__}: {line}"
