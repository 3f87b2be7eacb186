"""Systems that take turns, so that a slow moment of the machine hits all of them.

Each number of threads has a process of its own, because thread pools disturb each other; within it
the systems take turns. So a ratio of two systems means something on a machine that is not quiet,
where a number of milliseconds does not.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from edge_ser.errors import EdgeSerError
from edge_ser.timing import WARM_UP, noise, peak_memory_mb, summary
from export.parent import end_with_parent

Turn = Callable[[], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A system that is ready.

    Attributes:
        turns: What is timed: ``"engine"`` (samples to logits), and ``"end_to_end"`` (`predict`)
            where there is a `Recognizer`.
        facts: What its row tells, beside the times.
        settle: Called once before the turns: chooses the best setting, returns more facts.
    """

    turns: dict[str, Turn]
    facts: Row
    settle: Callable[[], Row] = dict


@dataclass(frozen=True)
class System:
    """One row of the table: its name, and what loads it for a window in s and some threads."""

    name: str
    load: Callable[[float, int], Loaded]


def take_turns(systems: Sequence[System], window_s: float, threads: int, runs: int) -> list[Row]:
    """Load all systems, then time them round by round. Runs in a process of its own.

    Args:
        systems: What is timed; one that cannot be loaded has a row that says why.
        window_s: Length of the samples in seconds.
        threads: How many compute.
        runs: Rounds that count.

    Returns:
        A row for each system, with its latencies in ms.
    """
    rows: list[Row] = []
    turns: list[tuple[list[float], Turn]] = []
    for system in systems:
        row: Row = {"system": system.name, "threads": threads}
        rows.append(row)
        try:
            loaded = system.load(window_s, threads)
        except (EdgeSerError, ImportError, OSError) as exc:
            row["not_measured"] = str(exc)
            continue
        row |= {**loaded.facts, **loaded.settle(), "samples_ms": {n: [] for n in loaded.turns}}
        turns += [(row["samples_ms"][name], run) for name, run in loaded.turns.items()]
    gc.freeze()  # collecting what torch imported would show up in the p99 of everybody
    bar = f"{window_s:g} s, threads: {threads}"
    for i in tqdm(range(WARM_UP + runs), desc=bar, unit="round"):
        for samples_ms, run in turns:
            elapsed_ms = warm_ms(run)
            if i >= WARM_UP:
                samples_ms.append(round(elapsed_ms, 4))
    return rows


def first_moments(system: System, window_s: float, threads: int) -> Row:
    """Time importing and loading, and the first run. Runs in a process of its own."""
    row = {"system": system.name, "threads": threads}
    start = time.perf_counter()
    try:
        loaded = system.load(window_s, threads)
    except (EdgeSerError, ImportError, OSError) as exc:
        return {**row, "not_measured": str(exc)}
    ready = time.perf_counter()
    loaded.turns["engine"]()
    return {
        **row,
        **loaded.facts,
        "load_ms": (ready - start) * 1e3,
        "first_run_ms": (time.perf_counter() - ready) * 1e3,
        "peak_memory_mb": peak_memory_mb(),
    }


def ratio(numerators_ms: Sequence[float], denominators_ms: Sequence[float]) -> float:
    """Return the median of the ratios of two systems, round by round."""
    return statistics.median(a / b for a, b in zip(numerators_ms, denominators_ms, strict=True))


def add_statistics(rows: Sequence[Row], window_s: float) -> list[Row]:
    """Return rows of one number of threads with what follows from their latencies.

    That is percentiles, the real-time factor, the speedup against the first row, and what
    `predict` adds to the engine.
    """
    reference_ms = rows[0].get("samples_ms", {}).get("engine")
    finished = []
    for row in rows:
        added: Row = {}
        if samples_ms := row.get("samples_ms"):
            engine_ms = samples_ms["engine"]
            added["stats"] = {turn: summary(values) for turn, values in samples_ms.items()}
            added["rtf"] = added["stats"]["engine"]["p50_ms"] / 1e3 / window_s
            added["speedup"] = ratio(reference_ms, engine_ms) if reference_ms else None
            if "end_to_end" in samples_ms:
                pairs = zip(samples_ms["end_to_end"], engine_ms, strict=True)
                added["predict_adds_ms"] = statistics.median(a - b for a, b in pairs)
        finished.append({**row, **added})
    return finished


def import_torch(threads: int) -> Any:
    """Import torch with as many threads, as idle between runs, as ONNX Runtime has."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    import torch

    torch.set_num_threads(threads)
    return torch


def torch_turn(torch: Any, model: Any, window_s: float) -> Turn:
    """Return what runs a network on noise at 16 kHz."""
    return partial(torch.inference_mode()(model), torch.from_numpy(noise(window_s, 16_000))[None])


def choose_attention(model: Any, run: Turn) -> str:
    """Set the faster of two forms of attention of a network of transformers; return which it is."""
    times_ms: dict[str, list[float]] = {"eager": [], "sdpa": []}
    for _ in range(5):
        for attention, values in times_ms.items():
            model.set_attn_implementation(attention)
            values.append(warm_ms(run))
    (best_ms, best), (other_ms, other) = sorted(
        (statistics.median(values), attention) for attention, values in times_ms.items()
    )
    model.set_attn_implementation(best)
    return f"{best} attention, {best_ms:.0f} ms against {other_ms:.0f} ms {other}"


def warm_ms(run: Turn) -> float:
    """Time a run, after one that brings its weights back into the caches that others used."""
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def in_child(function: Callable[..., Any], *args: object) -> Any:
    """Return what a function returns in a fresh process; peak memory is then its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        return pool.submit(function, *args).result()
