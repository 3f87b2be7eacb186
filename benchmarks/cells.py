"""One cell of `benchmarks gpu`: how long a batch takes, and whether the answers are right."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.networks import Graph, Network, Weights
from benchmarks.runtimes import RUNTIMES
from benchmarks.subjects import RATE_HZ, synthetic_speech
from benchmarks.turns import Row
from edge_ser.bundle import Metadata
from edge_ser.engines.base import Engine
from edge_ser.errors import EngineError
from edge_ser.recognizer import Recognizer
from edge_ser.timing import WARM_UP, noise
from export.probe import engine_of

WARM_UP_S = 0.3
"""A GPU raises its clocks after a moment of work only."""

PROBES = 4
"""Windows of sounds like speech whose logits are held against those of the processor."""

Clips = Sequence[tuple[Path, str]]
"""Files, and their emotions where they are known."""


@dataclass(frozen=True)
class Expected:
    """What the processor makes of some weights in windows of one length.

    Attributes:
        logits: Of the probes, (`PROBES`, C).
        labels: Of the clips.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        runtime: A key of `RUNTIMES`.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        batch: Windows at once.
        window: Samples of each.
        runs: That count.
        subject: What is run.
        expected: What the processor makes of it; a text says why that is not known.
        clips: What accuracy is measured on, one by one.
    """

    runtime: str
    precision: str
    batch: int
    window: int
    runs: int
    subject: Graph | Network
    expected: Expected | str
    clips: Clips


class Filled:
    """An engine whose windows are all of one length: a shorter one is repeated until it is full.

    So the processor hears the same as an engine of fixed shape.
    """

    def __init__(self, engine: Engine, window: int) -> None:
        """Take an engine, and the samples of a window."""
        self._engine, self._window = engine, window
        self.device, self.graph, self.close = engine.device, engine.graph, engine.close

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits (1, C) of a window (1, T); see `Engine`."""
        return self._engine.run(np.resize(samples, (1, self._window)))


def rate_of(weights: Weights) -> int:
    """Return the rate of the samples that a network hears, in Hz."""
    return weights.metadata.sample_rate_hz if weights.metadata else RATE_HZ


def expected_of(weights: Weights, window: int, clips: Clips) -> Expected:
    """Return what the processor makes of some weights. Runs in a process of its own.

    Raises:
        EdgeSerError: ONNX Runtime is not installed, or does not take the graph or a clip.
    """
    engine = engine_of(weights.reference)
    logits = np.concatenate([engine.run(probe[np.newaxis]) for probe in _probes(window)])
    return Expected(logits, _labels(engine, weights.metadata, window, clips))


def measure_cell(cell: Cell) -> Row:
    """Time a cell from samples to logits, both on the host, and compare its answers.

    Raises:
        EngineError: Its logits are not numbers.
        Exception: Whatever the runtime raises.
    """
    start = time.perf_counter()
    engine, facts = RUNTIMES[cell.runtime].open(
        cell.subject, cell.precision, cell.batch, cell.window
    )
    row: Row = {"load_s": time.perf_counter() - start, **facts}
    row |= {"device": engine.device, "graph": engine.graph}
    row["off"] = _off(engine, cell)
    samples = np.tile(noise(1.0, cell.window), (cell.batch, 1))
    row["samples_ms"] = _time(engine, samples, cell.runs)
    row["accuracy"] = _accuracy(engine, cell)
    engine.close()
    return row


def _time(engine: Engine, samples: NDArray[np.float32], runs: int) -> list[float]:
    gc.freeze()  # collecting what was imported would show up in the p99
    begin, warm = time.perf_counter(), 0
    while warm < WARM_UP or time.perf_counter() - begin < WARM_UP_S:
        engine.run(samples)
        warm += 1
    samples_ms = []
    for _ in range(runs):
        start = time.perf_counter()
        engine.run(samples)
        samples_ms.append(round((time.perf_counter() - start) * 1e3, 4))
    return samples_ms


def _probes(window: int) -> list[NDArray[np.float32]]:
    return [np.resize(one, window) for one in synthetic_speech(PROBES, 1.0, seed=4)]


def _off(engine: Engine, cell: Cell) -> float | Row:
    """Return the largest difference from the processor's logits, as a part of the largest one."""
    batches = np.resize(np.stack(_probes(cell.window)), (max(PROBES, cell.batch), cell.window))
    parts = [engine.run(batches[n : n + cell.batch]) for n in range(0, len(batches), cell.batch)]
    found = np.concatenate(parts)[:PROBES]
    if not np.isfinite(found).all():
        raise EngineError(f"{engine.graph} on {engine.device}: logits are NaN or infinity")
    if isinstance(cell.expected, str):
        return {"not_measured": cell.expected}
    logits = cell.expected.logits
    return float(np.abs(found - logits).max() / np.abs(logits).max())


def _accuracy(engine: Engine, cell: Cell) -> Row:
    metadata = cell.subject.weights.metadata
    if metadata is None:
        return {"not_measured": f"not trained ({cell.subject.weights.source})"}
    if not cell.clips:
        return {"not_measured": "no --manifest"}
    if isinstance(cell.expected, str):
        return {"not_measured": cell.expected}
    from export import metrics

    found = _labels(engine, metadata, cell.window, cell.clips)
    pairs = zip(found, cell.expected.labels, strict=True)
    row: Row = {
        "clips": len(cell.clips),
        "labels_equal": float(np.mean([a == b for a, b in pairs])),
        "reference": cell.subject.weights.reference.name,
    }
    place = metadata.labels.index
    known = [(place(e), place(f)) for (_, e), f in zip(cell.clips, found, strict=True) if e]
    if known:
        true, answered = np.array(known).T
        row["ua"] = float(metrics.ua(metrics.confusion(true, answered, len(metadata.labels))))
    return row


def _labels(
    engine: Engine, metadata: Metadata | None, window: int, clips: Clips
) -> tuple[str, ...]:
    """Return the labels of clips, each in windows of one length."""
    if metadata is None:
        return ()
    window_s = window / metadata.sample_rate_hz
    hop_s = min(metadata.hop_s, window_s - 0.4)  # as near to each other as metadata allows
    cut = replace(metadata, window_s=window_s, hop_s=hop_s)
    recognizer = Recognizer(cut, Filled(engine, window))
    return tuple(recognizer.predict(path).label for path, _ in clips)
