"""Every network in every precision by every runtime on a GPU: each cell measured, or its error.

Cells are kept in a file as they come; those that were measured are not measured again, those that
failed are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path

from tqdm import tqdm

from benchmarks import machine
from benchmarks.cells import Cell, Clips, Expected, expected_of, measure_cell, rate_of
from benchmarks.networks import Graph, Model, Network, Weights
from benchmarks.processes import alone, each
from benchmarks.roofline import Work, peak_of, work_of
from benchmarks.runtimes import RUNTIMES
from benchmarks.turns import Row
from edge_ser.bundle import GPU_GRAPHS
from edge_ser.errors import EdgeSerError
from edge_ser.timing import summary
from edge_ser.verification import read_clips
from export.stage import fingerprint, key_of

PACKAGES = (
    "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "cuda-bindings",
    "torch", "transformers",
)  # fmt: skip
CELLS = "cells.jsonl"


def measure(
    models: Sequence[Model],
    out: Path,
    *,
    runtimes: Sequence[str] | None,
    batches: Sequence[int],
    window_s: float,
    runs: int,
    manifest: Path | None,
    longest_s: float,
) -> Row:
    """Measure all cells.

    Args:
        models: See `benchmarks.networks.model_of`.
        out: Takes the file of the cells.
        runtimes: Keys of `RUNTIMES`; None means all.
        batches: Numbers of windows at once; with 1 among them, trained models are asked for clips.
        window_s: Length of a window in seconds.
        runs: That count.
        manifest: Of the clips, see `edge_ser.verification.read_clips`.
        longest_s: What takes longer for one cell is given up.

    Returns:
        The JSON object that `benchmarks.gpu_report` shows.

    Raises:
        AudioError: The manifest cannot be used.
    """
    try:
        gpu = alone(machine.describe_gpu)
    except EdgeSerError as exc:
        gpu = {"not_measured": str(exc)}
    names = list(runtimes or RUNTIMES)
    heard = fingerprint([manifest]) if manifest else ""
    protocol = {"window_s": window_s, "runs": runs, "clips": heard}
    expected = _Expected(window_s, manifest)
    kept = _kept(out / CELLS)
    rows: list[Row] = []
    waiting: list[tuple[Cell, str, Row]] = []
    for model, precision, name, batch in product(models, GPU_GRAPHS, names, batches):
        row: Row = {"model": model.name, "precision": precision, "runtime": name, "batch": batch}
        rows.append(row)
        subject = _subject(model, precision, name)
        if isinstance(subject, str):
            row["not_measured"] = subject
            continue
        row |= {"weights": subject.weights.source, "sha256": subject.sha256}
        clips = expected.clips(subject.weights) if batch == 1 else ()
        versions = machine.versions(RUNTIMES[name].packages)
        reads = {**row, **protocol, "clips": heard if clips else "", "gpu": gpu}
        key = key_of({**reads, "versions": versions})
        if key in kept:
            row |= kept[key]
            continue
        window = round(window_s * rate_of(subject.weights))
        how = (name, precision, batch, window, runs)
        waiting.append((Cell(*how, subject, expected.of(subject.weights), clips), key, row))
    with tqdm(total=len(waiting), desc="cells", unit="cell") as bar:
        waiting.sort(key=lambda one: names.index(one[0].runtime))
        for name, group in groupby(waiting, key=lambda one: one[0].runtime):
            bar.set_postfix_str(RUNTIMES[name].title)
            together = list(group)
            found = each(measure_cell, [cell for cell, _, _ in together], longest_s)
            for (_, key, row), one in zip(together, found, strict=True):
                row |= one
                bar.update()
                if "not_measured" not in one:
                    with (out / CELLS).open("a", encoding="utf-8") as stream:
                        # Behind a line that was cut off, a new one begins.
                        stream.write("\n" + json.dumps({"key": key, "row": one}))
    provenance = machine.provenance(PACKAGES)
    floors = _floors(models, window_s, batches, gpu, provenance["machine"]["cpu"])
    return {
        "schema": 1,
        "benchmark": "gpu",
        **provenance,
        "gpu": gpu,
        "protocol": protocol,
        "floors": floors,
        "rows": [_finished(row, floors) for row in rows],
    }


def _subject(model: Model, precision: str, name: str) -> Graph | Network | str:
    """Return what a runtime takes of a model, or why there is nothing."""
    runtime = RUNTIMES[name]
    if precision == "int8" and runtime.int8:
        return runtime.int8
    return model.graphs[precision] if runtime.reads is Graph else model.network


class _Expected:
    """The answers of the processor, asked for when they are needed first."""

    def __init__(self, window_s: float, manifest: Path | None) -> None:
        self._window_s, self._manifest = window_s, manifest
        self._found: dict[Path, Expected | str] = {}

    def clips(self, weights: Weights) -> Clips:
        """Return the clips that weights are asked for, if they are trained."""
        if self._manifest is None or weights.metadata is None:
            return ()
        return read_clips(self._manifest, weights.metadata.labels)

    def of(self, weights: Weights) -> Expected | str:
        """Return the answers, or why there are none."""
        if weights.reference not in self._found:
            window = round(self._window_s * rate_of(weights))
            try:
                found = alone(expected_of, weights, window, self.clips(weights))
            except EdgeSerError as exc:
                found = str(exc)
            self._found[weights.reference] = found
        return self._found[weights.reference]


def _kept(file: Path) -> dict[str, Row]:
    """Return the cells of a file by their keys; a line that was cut off is none."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            document = json.loads(line)
        except ValueError:
            continue
        found[document["key"]] = document["row"]
    return found


def _floors(
    models: Sequence[Model], window_s: float, batches: Sequence[int], gpu: Row, board: str
) -> list[Row]:
    """Return what each graph does, and the least time in ms by batch, or why it is not known."""
    graphs = [
        (model.name, precision, graph)
        for model in models
        for precision, graph in model.graphs.items()
        if isinstance(graph, Graph)
    ]
    asked = [(graph.file, round(window_s * rate_of(graph.weights))) for _, _, graph in graphs]
    found = each(_count, asked, longest_s=600)
    rows = []
    counting = tqdm(graphs, desc="roofline", unit="graph")
    for (name, precision, graph), counts in zip(counting, found, strict=True):
        row: Row = {"model": name, "precision": precision, "graph": graph.file.name}
        row |= {"weights": graph.weights.source, **counts}
        rows.append(row)
        if "not_measured" in counts:
            continue
        try:
            if "not_measured" in gpu:
                raise EdgeSerError("no GPU is known here")
            peak = peak_of(gpu["name"], board)
        except EdgeSerError as exc:
            row["not_measured"] = str(exc)
            continue
        work = Work(counts["macs"], counts["weight_bytes"])
        row["floor_ms"] = {str(batch): work.floor_ms(peak, batch) for batch in batches}
        row["peak"] = asdict(peak)
    return rows


def _count(asked: tuple[Path, int]) -> Row:
    return asdict(work_of(*asked))


def _finished(row: Row, floors: Sequence[Row]) -> Row:
    """Return a row with what follows from its latencies."""
    if "samples_ms" not in row:
        return row
    stats = summary(row["samples_ms"])
    p50_ms = stats["p50_ms"]
    assert p50_ms  # of one latency or more
    added: Row = {"stats": stats, "windows_per_s": row["batch"] / p50_ms * 1e3}
    place = (row["model"], row["precision"])
    (floor,) = (one for one in floors if (one["model"], one["precision"]) == place)
    if "floor_ms" in floor:
        added["floor_ms"] = floor["floor_ms"][str(row["batch"])]
        added["of_floor"] = p50_ms / added["floor_ms"]
    return {**row, **added}
