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
from dataclasses import dataclass, field
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine
from edge_ser.bundle import FP32_GRAPH, Bundle, sha256
from edge_ser.errors import EdgeSerError
from edge_ser.recognizer import Recognizer
from edge_ser.timing import WARM_UP, peak_memory_mb, summary

COLD_RUNS = 15
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaded:
    """A system that is ready.

    Attributes:
        turns: What is timed: ``"engine"`` (samples to logits), and ``"end_to_end"`` (`predict`)
            where there is a `Recognizer`.
        facts: What its row tells, beside the times.
        settle: Finds the best setting before the turns, and returns more facts.
    """

    turns: dict[str, Callable[[], object]]
    facts: dict[str, Any]
    settle: Callable[[], dict[str, Any]] = field(default=dict)


@dataclass(frozen=True)
class Wav2Vec2:
    """Wav2Vec2-base (arXiv 2006.11477) with a classification head, from raw samples.

    Its weights are random: latency does not depend on them.
    """

    name: str = "torch FP32 wav2vec2-base"

    def load(self, window_s: float, threads: int) -> Loaded:
        """Build it; `settle` keeps the faster form of attention."""
        torch = _torch(threads)
        from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

        model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(num_labels=7)).eval()
        run = _inference(torch, model, window_s)

        def settle() -> dict[str, Any]:
            times_ms: dict[str, list[float]] = {"eager": [], "sdpa": []}
            for _ in range(5):
                for attention, samples_ms in times_ms.items():
                    model.set_attn_implementation(attention)
                    samples_ms.append(_warm_ms(run))
            medians = {name: statistics.median(values) for name, values in times_ms.items()}
            best = min(medians, key=medians.__getitem__)
            model.set_attn_implementation(best)
            other = min(set(medians) - {best})
            versus = f"{medians[best]:.0f} ms against {medians[other]:.0f} ms {other}"
            return {"detail": f"random weights; attention {best} ({versus})"}

        return Loaded({"engine": run}, {"detail": "random weights"}, settle)


@dataclass(frozen=True)
class TorchDefault:
    """The network of the recipe `default` before it is exported."""

    recipes: Path
    weights: Path | None
    trained: Path | None
    name: str = "torch FP32 default"

    def load(self, window_s: float, threads: int) -> Loaded:
        """Build it; without a trained head from random numbers."""
        if self.weights is None:
            raise EdgeSerError("needs --weights, the pretrained encoder")
        torch = _torch(threads)
        from export.encoders import load_encoder
        from export.model import Classifier, load_classifier, new_head
        from export.recipe import read_recipe

        recipe = read_recipe(self.recipes / "default.toml")
        if not (self.weights / recipe.encoder.source).is_dir():  # or it would be downloaded
            raise EdgeSerError(f"--weights has no {recipe.encoder.source}")
        if self.trained:
            model = load_classifier(recipe, self.weights, self.trained)
            facts = {"detail": "trained head", "head_sha256": sha256(self.trained)}
        else:
            encoder = load_encoder(recipe.encoder, self.weights, recipe.windows.window_s)
            model = Classifier(encoder, new_head(recipe, encoder.states, encoder.dim)).eval()
            facts = {"detail": "random head"}
        return Loaded({"engine": _inference(torch, model, window_s)}, facts)


@dataclass(frozen=True)
class OnnxBundle:
    """One graph of a bundle, as `Recognizer` runs it."""

    path: Path
    bundle: str
    precision: str

    @property
    def name(self) -> str:
        """Return e.g. ``"ONNX INT8 tiny"``."""
        return f"ONNX {self.precision.upper()} {self.bundle}"

    def load(self, window_s: float, threads: int) -> Loaded:
        """Open it."""
        if self.precision == "fp32" and not (self.path / FP32_GRAPH).is_file():
            raise EdgeSerError(f"the bundle has no {FP32_GRAPH}")
        recognizer = Recognizer.load(self.path, precision=self.precision, threads=threads)
        metadata, engine = recognizer.metadata, recognizer.engine
        rate = metadata.sample_rate_hz
        samples = _noise(window_s, rate)
        batch = samples[np.newaxis]  # (1, T)
        facts = {
            "detail": engine.graph,
            "graph_sha256": metadata.files[engine.graph.removesuffix(" (float)")].sha256,
            "bundle_sha256": sha256(self.path / "metadata.json"),  # it lists all the others
        }
        turns = {
            "engine": lambda: engine.run(batch),
            "end_to_end": lambda: recognizer.predict(samples, rate),
        }
        return Loaded(turns, facts)


System = Wav2Vec2 | TorchDefault | OnnxBundle


def measure(
    bundles: Sequence[Bundle],
    torch_default: TorchDefault,
    *,
    window_s: float,
    threads: Sequence[int],
    runs: int,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        bundles: Each is measured in INT8 and, where it has the graph, in full precision.
        torch_default: The network before its export.
        window_s: Length of the samples in seconds.
        threads: Numbers of threads, one process each.
        runs: Rounds that count.

    Returns:
        A JSON object, see `benchmarks.report`.
    """
    onnx = [OnnxBundle(b.path, b.metadata.name, p) for b in bundles for p in ("fp32", "int8")]
    systems: list[System] = [Wav2Vec2(), torch_default, *onnx]
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
        reference = measured[0].get("samples_ms", {}).get("engine")
        rows += [_with_statistics(row, window_s, reference) for row in measured]
    loads = [
        _in_child(_first_moments, system, window_s, threads[0])
        for system in tqdm(systems, desc="load and memory", unit="process")
    ]
    cold = _cold_starts(bundles[0].path, min(runs, COLD_RUNS))
    return {**result, "rows": rows, "loads": loads, "cold": cold}


def ratio(numerators_ms: Sequence[float], denominators_ms: Sequence[float]) -> float:
    """Return the median of the ratios of two systems, round by round."""
    return statistics.median(a / b for a, b in zip(numerators_ms, denominators_ms, strict=True))


def _with_statistics(
    row: dict[str, Any], window_s: float, reference_ms: Sequence[float] | None
) -> dict[str, Any]:
    """Add to a row what follows from its latencies and from those of the first system."""
    if "not_measured" in row:
        return row
    engine_ms, end_to_end_ms = (row["samples_ms"].get(k) for k in ("engine", "end_to_end"))
    row["stats"] = {name: summary(values) for name, values in row["samples_ms"].items()}
    row["rtf"] = row["stats"]["engine"]["p50_ms"] / 1e3 / window_s
    row["speedup"] = ratio(reference_ms, engine_ms) if reference_ms else None
    if end_to_end_ms:
        added_ms = (b - a for a, b in zip(engine_ms, end_to_end_ms, strict=True))
        row["predict_adds_ms"] = statistics.median(added_ms)
    return row


def _take_turns(
    systems: Sequence[System], window_s: float, threads: int, runs: int
) -> list[dict[str, Any]]:
    """Load all systems, then time them round by round. Runs in a process of its own."""
    rows: list[dict[str, Any]] = []
    turns: list[tuple[list[float], Callable[[], object]]] = []
    for system in systems:
        row: dict[str, Any] = {"system": system.name, "threads": threads}
        rows.append(row)
        try:
            loaded = system.load(window_s, threads)
        except (EdgeSerError, ImportError, OSError) as exc:
            row["not_measured"] = str(exc)
            continue
        row |= {**loaded.facts, **loaded.settle(), "samples_ms": {n: [] for n in loaded.turns}}
        turns += [(row["samples_ms"][name], run) for name, run in loaded.turns.items()]
    gc.freeze()  # collecting what torch imported would show up in the p99 of everybody
    title = f"{threads} thread{'s' * (threads > 1)}"
    for i in tqdm(range(WARM_UP + runs), desc=title, unit="round"):
        for samples_ms, run in turns:
            elapsed_ms = _warm_ms(run)
            if i >= WARM_UP:
                samples_ms.append(round(elapsed_ms, 4))
    return rows


def _first_moments(system: System, window_s: float, threads: int) -> dict[str, Any]:
    """Time importing and loading of one system, and its first run. In a process of its own."""
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
        "detail": loaded.facts["detail"],
        "load_ms": (ready - start) * 1e3,
        "first_run_ms": (time.perf_counter() - ready) * 1e3,
        "peak_memory_mb": peak_memory_mb(),
    }


def _cold_starts(bundle: Path, runs: int) -> dict[str, Any]:
    """Time whole processes in turns: a first prediction, and the imports that it cannot avoid."""
    commands = {
        "edge-ser predict --sample": "-m edge_ser predict --sample --bundle".split() + [str(bundle)],
        'python -c "import numpy, onnxruntime"': ["-c", "import numpy, onnxruntime"],
    }
    times_ms: dict[str, list[float]] = {name: [] for name in commands}
    for i in tqdm(range(1 + runs), desc="cold processes", unit="round"):
        for name, words in commands.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *words], cwd=machine.ROOT, capture_output=True, text=True
            )
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                return {"not_measured": f"{name} failed: {last}"}
            if i:  # the first round reads the files into memory
                times_ms[name].append(round(elapsed_ms, 2))
    predict_ms, imports_ms = times_ms.values()
    return {
        "samples_ms": times_ms,
        "stats": {name: summary(values) for name, values in times_ms.items()},
        "ratio": ratio(predict_ms, imports_ms),
    }


def _in_child(function: Callable[..., Result], *args: object) -> Result:
    """Return what a function returns in a fresh process; its peak memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _warm_ms(run: Callable[[], object]) -> float:
    """Time a run after one that brings its weights back into the caches that others used."""
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _noise(seconds: float, rate_hz: int) -> NDArray[np.float32]:
    """Return noise of shape (T,)."""
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)


def _torch(threads: int) -> Any:
    """Import torch with as many threads, as idle between runs, as ONNX Runtime has."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    torch.set_num_threads(threads)
    return torch


def _inference(torch: Any, model: Any, window_s: float) -> Callable[[], object]:
    """Return a run of a torch network on a 16 kHz window."""
    batch = torch.from_numpy(_noise(window_s, 16_000))[None]  # (1, T)

    def run() -> object:
        with torch.inference_mode():
            return model(batch)

    return run
