"""One stage of a recipe: a folder that is made once and kept until something it reads changes."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

KEY_FILE = "stage.json"


def run_stage(folder: Path, reads: dict[str, Any], make: Callable[[Path], None]) -> str:
    """Make a folder, unless it was made from the same inputs before.

    The work is done in ``<folder>.partial``, which keeps its contents when the process is killed:
    ``make`` is called on it again and goes on from what it finds. Only a finished folder gets the
    final name, so a half-made one is never mistaken for it.

    Args:
        folder: Where the results are to lie.
        reads: Everything the results depend on: numbers, texts, dataclasses, keys of earlier
            stages.
        make: Fills the folder that it is given.

    Returns:
        The key of the stage, for the ``reads`` of the next.
    """
    document, key = _document(reads), key_of(reads)
    done = {"key": key, "reads": document}
    if _read(folder / KEY_FILE) == done:
        print(f"{folder}: nothing changed", file=sys.stderr)
        return key
    partial = partial_of(folder)
    if _read(partial / KEY_FILE) == done:
        print(f"{folder}: going on where it was", file=sys.stderr)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / KEY_FILE).write_text(json.dumps(done, indent=1))
        print(f"{folder}: started", file=sys.stderr)
    make(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return key


def key_of(reads: dict[str, Any]) -> str:
    """Return the key of a stage that reads these, SHA-256 in hexadecimal."""
    return hashlib.sha256(json.dumps(_document(reads)).encode()).hexdigest()


def _document(reads: dict[str, Any]) -> Any:
    return json.loads(json.dumps(reads, default=_plain, sort_keys=True))


def discard(folder: Path) -> None:
    """Remove a stage's results, finished or not, so that it is made from nothing."""
    for stale in (folder, partial_of(folder)):
        shutil.rmtree(stale, ignore_errors=True)


def partial_of(folder: Path) -> Path:
    """Return where a stage works until it is finished."""
    return folder.with_name(folder.name + ".partial")


def fingerprint(files: Iterable[Path]) -> str:
    """Return one SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is not part of a stage's inputs")


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
