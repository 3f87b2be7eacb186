"""Latency of every way to run the models, loading, memory and cold starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.turns import (
    Loaded,
    Row,
    System,
    Turn,
    add_statistics,
    choose_attention,
    first_moments,
    import_torch,
    in_child,
    ratio,
    take_turns,
    torch_turn,
)
from edge_ser.bundle import FP32_GRAPH, Bundle, sha256
from edge_ser.errors import EdgeSerError
from edge_ser.recognizer import Recognizer
from edge_ser.samples import sample_paths
from edge_ser.timing import WARM_UP, noise, summary

COLD_RUNS = 15
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")


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
        **machine.provenance(PACKAGES),
        "protocol": {"window_s": window_s, "runs": runs, "warm_up": WARM_UP},
    }
    rows = []
    for count in threads:
        measured = in_child(take_turns, systems, window_s, count, runs)
        rows += add_statistics(measured, window_s)
    loads = [
        in_child(first_moments, system, window_s, threads[0])
        for system in tqdm(systems, desc="load and memory", unit="process")
    ]
    return {**result, "rows": rows, "loads": loads, "cold": _cold_starts(min(runs, COLD_RUNS))}


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
    torch = import_torch(threads)
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(num_labels=7)).eval()
    run = torch_turn(torch, model, window_s)

    def settle() -> Row:
        return {"detail": f"random weights; {choose_attention(model, run)}"}

    return Loaded({"engine": run}, {"detail": "random weights"}, settle)


def _load_torch_default(
    recipes: Path, weights: Path | None, trained: Path | None, window_s: float, threads: int
) -> Loaded:
    """The network of the recipe `default`, before its export."""
    if weights is None:
        raise EdgeSerError("needs --weights, the pretrained encoder")
    torch = import_torch(threads)
    from export.model import load_classifier, new_classifier
    from export.recipe_file import read_recipe

    recipe = read_recipe(recipes / "default.toml")
    if not (weights / recipe.encoder.source).is_dir():  # or it would be downloaded
        raise EdgeSerError(f"--weights has no {recipe.encoder.source}")
    if trained:
        model = load_classifier(recipe, weights, trained)
        facts = {"detail": "trained head", "head_sha256": sha256(trained)}
    else:
        model = new_classifier(recipe, weights).eval()
        facts = {"detail": "random head"}
    return Loaded({"engine": torch_turn(torch, model, window_s)}, facts)


def _load_onnx(path: Path, precision: str, window_s: float, threads: int) -> Loaded:
    """One graph of a bundle, alone and through `Recognizer.predict`."""
    if precision == "fp32" and not (path / FP32_GRAPH).is_file():
        raise EdgeSerError(f"the bundle has no {FP32_GRAPH}")
    recognizer = Recognizer.load(path, precision=precision, threads=threads)
    metadata, engine = recognizer.metadata, recognizer.engine
    samples = noise(window_s, metadata.sample_rate_hz)
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
