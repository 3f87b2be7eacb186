"""Latency of every way to run the models, in turns, so that a slow moment hits all of them.

Each number of threads has a process of its own, because thread pools disturb each other; within it
the systems take turns. So a ratio of two systems means something on a machine that is not quiet,
where a number of milliseconds does not.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine
from edge_ser.bundle import FP32_GRAPH, Bundle, sha256
from edge_ser.errors import EdgeSerError
from edge_ser.recognizer import Recognizer
from edge_ser.samples import sample_paths
from edge_ser.timing import WARM_UP, peak_memory_mb, summary

COLD_RUNS = 15
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")

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


def measure(
    bundles: Sequence[Bundle],
    recipes: Path,
    weights: Path | None,
    trained: Path | None,
    *,
    window_s: float,
    threads: Sequence[int],
    runs: int,
) -> Row:
    """Measure everything.

    Args:
        bundles: Each is measured in full precision, where it has that graph, and in INT8.
        recipes: Folder of ``default.toml``.
        weights: Folder of pretrained checkpoints.
        trained: ``model.safetensors`` of the recipe `default`; None means a random head.
        window_s: Length of the samples in seconds.
        threads: Numbers of threads.
        runs: Rounds that count.

    Returns:
        The JSON object that `benchmarks.report` shows.
    """
    systems = [
        System("torch FP32 wav2vec2-base", _load_wav2vec2),
        System("torch FP32 default", partial(_load_torch_default, recipes, weights, trained)),
    ]
    for bundle in bundles:
        for precision in ("fp32", "int8"):
            name = f"ONNX {precision.upper()} {bundle.metadata.name}"
            systems.append(System(name, partial(_load_onnx, bundle.path, precision)))
    result = {
        "schema": 1,
        "benchmark": "latency",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(PACKAGES),
        "protocol": {"window_s": window_s, "runs": runs, "warm_up": WARM_UP},
    }
    rows = []
    for count in threads:
        measured = _in_child(_take_turns, systems, window_s, count, runs)
        rows += add_statistics(measured, window_s)
    loads = [
        _in_child(_first_moments, system, window_s, threads[0])
        for system in tqdm(systems, desc="load and memory", unit="process")
    ]
    return {**result, "rows": rows, "loads": loads, "cold": _cold_starts(min(runs, COLD_RUNS))}


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


def _take_turns(systems: Sequence[System], window_s: float, threads: int, runs: int) -> list[Row]:
    """Load all systems, then time them round by round. Runs in a process of its own."""
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
    for i in tqdm(range(WARM_UP + runs), desc=f"threads: {threads}", unit="round"):
        for samples_ms, run in turns:
            elapsed_ms = _warm_ms(run)
            if i >= WARM_UP:
                samples_ms.append(round(elapsed_ms, 4))
    return rows


def _first_moments(system: System, window_s: float, threads: int) -> Row:
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


def _cold_starts(runs: int) -> Row:
    """Time whole processes in turns: the imports that none can avoid, and first predictions."""
    clip = sample_paths()[0]
    script = "from edge_ser.cli import program; program()"  # what pip installs as edge-ser
    commands = {
        'python -c "import numpy, onnxruntime"': ["-c", "import numpy, onnxruntime"],
        f"edge-ser predict {clip.name}": ["-c", script, "predict", str(clip)],
        "edge-ser predict --sample": ["-c", script, "predict", "--sample"],
    }
    # Bytecode is kept, as pip keeps it, also where the environment says otherwise.
    run = partial(
        subprocess.run,
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
    )
    samples_ms: dict[str, list[float]] = {name: [] for name in commands}
    for i in tqdm(range(1 + runs), desc="cold processes", unit="round"):
        for name, words in commands.items():
            start = time.perf_counter()
            done = run([sys.executable, *words])
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                return {"not_measured": f"{name} failed: {lines[-1]}"}
            if i:  # the first round reads the files into memory
                samples_ms[name].append(round(elapsed_ms, 2))
    stats = {name: summary(values) for name, values in samples_ms.items()}
    imports_ms, *predictions_ms = samples_ms.values()
    ratios = [ratio(values, imports_ms) for values in predictions_ms]
    return {"samples_ms": samples_ms, "stats": stats, "ratios": [1.0, *ratios]}


def _load_wav2vec2(window_s: float, threads: int) -> Loaded:
    """Wav2Vec2-base (arXiv 2006.11477) with a classification head, on raw samples."""
    torch = _import_torch(threads)
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(num_labels=7)).eval()
    run = _torch_turn(torch, model, window_s)

    def settle() -> Row:
        times_ms: dict[str, list[float]] = {"eager": [], "sdpa": []}
        for _ in range(5):
            for attention, values in times_ms.items():
                model.set_attn_implementation(attention)
                values.append(_warm_ms(run))
        (best_ms, best), (other_ms, other) = sorted(
            (statistics.median(values), attention) for attention, values in times_ms.items()
        )
        model.set_attn_implementation(best)
        chosen = f"{best} attention, {best_ms:.0f} ms against {other_ms:.0f} ms {other}"
        return {"detail": f"random weights; {chosen}"}

    return Loaded({"engine": run}, {"detail": "random weights"}, settle)


def _load_torch_default(
    recipes: Path, weights: Path | None, trained: Path | None, window_s: float, threads: int
) -> Loaded:
    """The network of the recipe `default`, before its export."""
    if weights is None:
        raise EdgeSerError("needs --weights, the pretrained encoder")
    torch = _import_torch(threads)
    from export.model import load_classifier, new_classifier
    from export.recipe import read_recipe

    recipe = read_recipe(recipes / "default.toml")
    if not (weights / recipe.encoder.source).is_dir():  # or it would be downloaded
        raise EdgeSerError(f"--weights has no {recipe.encoder.source}")
    if trained:
        model = load_classifier(recipe, weights, trained)
        facts = {"detail": "trained head", "head_sha256": sha256(trained)}
    else:
        model = new_classifier(recipe, weights).eval()
        facts = {"detail": "random head"}
    return Loaded({"engine": _torch_turn(torch, model, window_s)}, facts)


def _load_onnx(path: Path, precision: str, window_s: float, threads: int) -> Loaded:
    """One graph of a bundle, alone and through `Recognizer.predict`."""
    if precision == "fp32" and not (path / FP32_GRAPH).is_file():
        raise EdgeSerError(f"the bundle has no {FP32_GRAPH}")
    recognizer = Recognizer.load(path, precision=precision, threads=threads)
    metadata, engine = recognizer.metadata, recognizer.engine
    samples = _noise(window_s, metadata.sample_rate_hz)
    facts = {
        "graph": engine.graph,
        "graph_sha256": metadata.files[engine.graph.removesuffix(" (float)")].sha256,
        "bundle_sha256": sha256(path / "metadata.json"),  # it lists all the others
    }
    turns: dict[str, Turn] = {
        "engine": partial(engine.run, samples[np.newaxis]),  # (1, T)
        "end_to_end": partial(recognizer.predict, samples, metadata.sample_rate_hz),
    }
    return Loaded(turns, facts)


def _import_torch(threads: int) -> Any:
    """Import torch with as many threads, as idle between runs, as ONNX Runtime has."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    import torch

    torch.set_num_threads(threads)
    return torch


def _torch_turn(torch: Any, model: Any, window_s: float) -> Turn:
    return partial(torch.inference_mode()(model), torch.from_numpy(_noise(window_s, 16_000))[None])


def _noise(seconds: float, rate_hz: int) -> NDArray[np.float32]:
    """Return noise of shape (T,)."""
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)


def _warm_ms(run: Turn) -> float:
    """Time a run, after one that brings its weights back into the caches that others used."""
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _in_child(function: Callable[..., Any], *args: object) -> Any:
    """Return what a function returns in a fresh process; peak memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
