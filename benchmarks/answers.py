"""Answers to clips, given by another process: kept as they come, and compared."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edge_ser.errors import EngineError
from export.stage import run_stage

RESPOND = Path(__file__).with_name("respond.py")
ANSWERS = "answers.jsonl"

Row = dict[str, Any]


def ask(command: Sequence[str], job: Row, folder: Path, reads: Row) -> list[Row]:
    """Return what `benchmarks.respond` tells, then its answer to each clip.

    Args:
        command: Runs Python.
        job: See `benchmarks.respond.respond`; how many lines are known is found out here.
        folder: Keeps them, line by line as they come.
        reads: All that they depend on.

    Raises:
        EngineError: The process fails.
    """

    def make(folder: Path) -> None:
        file = folder / ANSWERS
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        known = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
        file.write_text("".join(known))
        (folder / "job.json").write_text(json.dumps({**job, "known": len(known)}))
        words = [*command, str(RESPOND), str(folder / "job.json")]
        total = 1 + len(job["clips"])
        with (
            file.open("a") as kept,
            (folder / "stderr.txt").open("w+") as said,
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True) as process,
            tqdm(
                total=total,
                initial=len(known),
                desc=f"{Path(job['bundle']).name}, {folder.stem}",
                unit="line",
            ) as bar,
        ):
            assert process.stdout  # a pipe, as asked for
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                bar.update()
            if process.wait():
                said.seek(0)
                last = ["it told no reason", *said.read().strip().splitlines()][-1]
                raise EngineError(f"{folder.stem} ended with {process.returncode}: {last}")

    run_stage(folder, reads, make)
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]


def facts(found: Sequence[Row], here: Sequence[Row]) -> Row:
    """Return what a system tells of itself, and two figures in place of what it measured.

    Args:
        found: Its lines.
        here: Those of this machine.

    Returns:
        How far the clip that it resampled is from this machine's, ``resampled_apart``, and the
        median time that a clip took in s, ``clip_s``, among the rest.
    """
    told = dict(found[0])
    apart = np.subtract(told.pop("resampled"), here[0]["resampled"])
    took_s = statistics.median(answer["s"] for answer in found[1:])
    return {**told, "resampled_apart": float(np.abs(apart).max()), "clip_s": took_s}


def compare(found: Sequence[Row], reference: Sequence[Row]) -> Row:
    """Compare answers with those to the same clips elsewhere, where more may have been asked.

    Returns:
        How many ``clips``, the share of ``labels_equal``, the ``median`` and the ``largest``
        difference of two probabilities, and the clip of the latter, ``worst``.
    """
    elsewhere = {one["clip"]: one["probs"] for one in reference}
    probs = np.array([[one["probs"], elsewhere[one["clip"]]] for one in found])  # (N, 2, C)
    apart = np.abs(probs[:, 0] - probs[:, 1])
    labels = probs.argmax(axis=2)
    return {
        "clips": len(found),
        "labels_equal": float((labels[:, 0] == labels[:, 1]).mean()),
        "median": float(np.median(apart)),
        "largest": float(apart.max()),
        "worst": found[apart.max(axis=1).argmax()]["clip"],
    }
