"""How the command line of ``python -m benchmarks`` reads its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; ``--help`` says what is right."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with status 2."""
        self.exit(2, f"benchmarks: {message}\n")


def option(
    verb: Any, name: str, kind: Any, default: Any, metavar: str, text: str, **more: Any
) -> None:
    """Add an argument to a verb."""
    verb.add_argument(name, type=kind, default=default, metavar=metavar, help=text, **more)


def existing(text: str) -> Path:
    """Return the path of something that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not there")
    return Path(text)


def output(text: str) -> Path:
    """Return the path of something that can be written."""
    if not Path(text).parent.is_dir():  # said now, not after minutes of measuring
        raise argparse.ArgumentTypeError(f"{text!r}: make its folder first")
    return Path(text)


def numbers(text: str) -> list[int]:
    """Return different numbers from 1, given with commas between them."""
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: different numbers from 1")
    return counts


def lengths(text: str) -> list[float]:
    """Return different lengths in s, given with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0.4 <= seconds <= 30 for seconds in found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: different numbers from 0.4 to 30")
    return found


def at_least(least: float, kind: type = float) -> Callable[[str], Any]:
    """Return what reads a number of a kind from a smallest one."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {least:g} or more")
        return value

    return read


def model(text: str) -> tuple[str, Path | None]:
    """Return name and folder of a model to measure, given as NAME or NAME=FOLDER."""
    from benchmarks.networks import known_models

    name, _, folder = text.partition("=")
    if folder and not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder!r} is no folder")
    if not folder and name not in known_models():
        known = ", ".join(known_models())
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {known}, or any NAME=FOLDER")
    return name, Path(folder) if folder else None


def runtimes(text: str) -> list[str]:
    """Return names of runtimes, given with commas between them."""
    from benchmarks.runtimes import RUNTIMES

    names = text.split(",")
    if not set(names) <= set(RUNTIMES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: some of {', '.join(RUNTIMES)}")
    return names
