"""What else makes a fine-tuned speech encoder small and fast on a CPU, from the same checkpoint.

All systems take turns, then each is asked for its answers. `benchmarks.prepare` writes the graphs.
This file imports neither torch nor the tools: what it runs is to be measured without them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine
from benchmarks.agreement import Answer, frame_cosine, graph_answers, labels_equal, torch_answers
from benchmarks.turns import (
    Loaded,
    Row,
    System,
    add_statistics,
    choose_attention,
    first_moments,
    import_torch,
    in_child,
    take_turns,
    torch_turn,
)
from edge_ser.bundle import sha256
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.errors import EdgeSerError
from edge_ser.external_data import external_files
from edge_ser.timing import WARM_UP, noise
from export.stage import KEY_FILE, fingerprint, run_stage

Samples = NDArray[np.float32]

PACKAGES = (
    "numpy", "onnx", "onnxruntime", "torch", "transformers", "optimum", "optimum-onnx",
    "nvidia-modelopt",
)  # fmt: skip
MEASURED = "measured.json"
CALIBRATION_S = 3.0
"""Seconds of each calibration window, and of the one that memory is measured with."""


@dataclass(frozen=True)
class Prepared:
    """What is measured.

    Attributes:
        checkpoint: Folder of transformers.
        fp32: Its graph in full precision.
        graphs: Row, file and settings of each quantizer's graph.
        refused: Why there is no file, by row.
    """

    checkpoint: Path
    fp32: Path
    graphs: tuple[tuple[str, Path, str], ...]
    refused: dict[str, str]


def measure(
    prepared: Prepared,
    clips: dict[float, list[Samples]],
    home: Path,
    *,
    threads: Sequence[int],
    runs: int,
) -> Row:
    """Measure everything; a run that was stopped goes on behind what it has measured.

    Args:
        prepared: What `benchmarks.prepare.prepare` returns.
        clips: For each length in s, windows of it, float32 (T,) at 16 kHz, whose answers are
            compared; all are of the same clips.
        home: Keeps what is measured.
        threads: Numbers of threads.
        runs: Rounds that count.

    Returns:
        The JSON object that `benchmarks.report` shows.
    """
    systems = systems_of(prepared)
    source = machine.provenance(PACKAGES)
    result = {
        "schema": 1,
        "benchmark": "peers",
        **source,
        "protocol": {
            "windows_s": list(clips),
            "runs": runs,
            "warm_up": WARM_UP,
            "clips": len(next(iter(clips.values()))),
            "memory_window_s": CALIBRATION_S,
        },
    }
    made = [prepared.fp32, *(f for name, f, _ in prepared.graphs if name not in prepared.refused)]
    reads = {
        "graphs": fingerprint(file.parent / KEY_FILE for file in made),
        "refused": prepared.refused,
        **{name: source[name] for name in ("commit", "versions")},
        "machine": {k: v for k, v in source["machine"].items() if k != "load_average"},
    }
    rows = []
    for count in threads:
        for window_s in clips:
            asked = (systems, window_s, count, runs)
            folder = home / f"threads {count}, {window_s:g} s"
            measured = _once(folder, {**reads, "runs": runs}, take_turns, *asked)
            rows += [{**row, "window_s": window_s} for row in add_statistics(measured, window_s)]
    reads["threads"] = threads[0]
    loads = [
        _once(home / f"load {place}", reads, first_moments, system, CALIBRATION_S, threads[0])
        for place, system in enumerate(tqdm(systems, desc="load and memory", unit="process"))
    ]
    return {**result, "rows": rows, "loads": loads, "answers": _compare(prepared, clips)}


def _once(folder: Path, reads: Row, function: Callable[..., Any], *args: object) -> Any:
    """Return what a function returns in a fresh process, or did in a run that was stopped."""

    def make(folder: Path) -> None:
        (folder / MEASURED).write_text(json.dumps(in_child(function, *args)))

    run_stage(folder, reads, make)
    return json.loads((folder / MEASURED).read_text())


def systems_of(prepared: Prepared) -> list[System]:
    """Return the rows of the table; the first is what the others are compared with."""
    full = partial(_load_graph, prepared.fp32, "the graph that the INT8 ones are made of", None)
    systems = [
        System("ONNX FP32", full),
        System("torch FP32, eager", partial(_load_torch, prepared.checkpoint, False)),
        System("torch FP32, compiled", partial(_load_torch, prepared.checkpoint, True)),
    ]
    for name, file, detail in prepared.graphs:
        load = partial(_load_graph, file, detail, prepared.refused.get(name))
        systems.append(System(name, load))
    return systems


def _load_graph(
    file: Path, detail: str, refused: str | None, window_s: float, threads: int
) -> Loaded:
    if refused:
        raise EdgeSerError(refused)
    engine = OnnxEngine(file, threads=threads)
    weights = [file.parent / name for name in sorted(external_files(file))]
    facts = {
        "detail": detail,
        "graph": file.name,
        "graph_sha256": sha256(file),
        "file_mb": sum(one.stat().st_size for one in (file, *weights)) / 1e6,
    }
    return Loaded({"engine": partial(engine.run, noise(window_s, 16_000)[np.newaxis])}, facts)


def _load_torch(checkpoint: Path, compiled: bool, window_s: float, threads: int) -> Loaded:
    if compiled:
        _require_compiler()
    torch = import_torch(threads)
    network, _ = load_network(checkpoint)
    tensors = [*network.parameters(), *network.buffers()]
    facts: Row = {"file_mb": sum(t.nbytes for t in tensors) / 1e6}
    if compiled:
        facts["detail"] = "torch.compile: inductor, static shapes, freezing; eager attention"
        run = torch_turn(torch, _compile(torch, network), window_s)
        try:
            run()
        except Exception as exc:  # those of dynamo, inductor and the C++ compiler share no base
            line = str(exc).partition("\n")[0]
            raise EdgeSerError(f"torch.compile: {line}") from exc
        return Loaded({"engine": run}, facts)
    run, inner = torch_turn(torch, network, window_s), network.encoder.model
    if not inner._supports_sdpa:
        return Loaded({"engine": run}, {**facts, "detail": "eager attention"})
    facts["detail"] = "the faster of eager and sdpa attention, chosen for each length"
    return Loaded({"engine": run}, facts, lambda: {"attention": choose_attention(inner, run)})


def load_network(checkpoint: Path) -> tuple[Any, tuple[str, ...]]:
    """Return a network from samples to logits, weight normalization merged, and its labels."""
    from export.finetuned import load_finetuned

    return load_finetuned(str(checkpoint), window_s=30.0, padded=True)  # both are of Whisper only


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")  # as inductor looks for it
    if not shutil.which(compiler):
        raise EdgeSerError(f"torch.compile needs a C++ compiler, and there is no {compiler!r}")


def _compile(torch: Any, network: Any) -> Any:
    return torch.compile(network, dynamic=False, options={"freezing": True})


def _compare(prepared: Prepared, clips: dict[float, list[Samples]]) -> list[Row]:
    """Compare the answers of all systems with those of the first.

    Each answers in a process of its own: several networks of 315 million parameters in one take
    more memory than a small machine has, and what has been measured would be lost with it.
    """
    asked: list[tuple[str, Any]] = [
        ("ONNX FP32", partial(graph_answers, prepared.fp32, prepared.fp32)),
        ("torch FP32, eager", partial(_torch_answers, prepared.checkpoint, False)),
        ("torch FP32, compiled", partial(_torch_answers, prepared.checkpoint, True)),
    ]
    asked += [
        (name, partial(graph_answers, prepared.fp32, file))
        for name, file, _ in prepared.graphs
        if name not in prepared.refused
    ]
    rows: list[Row] = []
    references: dict[float, list[Answer]] = {}
    for name, ask in tqdm(asked, desc="answers", unit="system"):
        row: Row = {"system": name}
        rows.append(row)
        try:
            answers = in_child(_all_answers, ask, clips)
        except (EdgeSerError, ImportError, OSError) as exc:
            row["not_measured"] = str(exc)
            continue
        except BrokenProcessPool:
            row["not_measured"] = "its process died; is the memory full?"
            continue
        references = references or answers
        row["windows"] = [
            {
                "window_s": window_s,
                "labels_equal": labels_equal(references[window_s], found),
                "frame_cosine": frame_cosine(references[window_s], found),
            }
            for window_s, found in answers.items()
        ]
    refused = [{"system": k, "not_measured": v} for k, v in prepared.refused.items()]
    return rows + refused


def _all_answers(
    ask: Callable[[list[Samples]], list[Answer]], clips: dict[float, list[Samples]]
) -> dict[float, list[Answer]]:
    return {window_s: ask(windows) for window_s, windows in clips.items()}


def _torch_answers(checkpoint: Path, compiled: bool, windows: Sequence[Samples]) -> list[Answer]:
    if compiled:
        _require_compiler()
    import torch

    network, _ = load_network(checkpoint)
    return torch_answers(network, _compile(torch, network) if compiled else network, windows)
