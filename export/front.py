"""The front of accuracy against time: which student to take where.

Every variant of a student's recipe is distilled and quantized; accuracy is that of the validation
speakers, time that of the INT8 graph on one thread. A candidate is on the front if none that is
as fast and as small is as accurate. Test speakers are not touched.
"""

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnxruntime
from tqdm import tqdm

from edge_ser.bundle import INT8_GRAPH, X86_GRAPH
from edge_ser.engines.onnx import OnnxEngine
from export.confidence import clip_probs
from export.errors import RecipeError
from export.model import load_classifier, trained_part
from export.run import Run
from export.scores import score
from export.seeds import columns, shown, spread
from export.speech import RATE_HZ
from export.train import window_logits
from export.variants import BASE, read_variants
from export.views import load_views
from export.workers import workers

WINDOW_S = 3.0  # or the window of the recipe, where it is shorter
ROUNDS = 60
TEACHER = "fold0"  # the teacher's head that has not heard the validation speakers


def run_front(
    path: Path, corpora: Path, weights: Path | None, out: Path, seeds: Sequence[int]
) -> None:
    """Make all candidates: ``<out>/<stem>/front.json``, ``.md`` and ``.png``; resumable.

    Raises:
        RecipeError: The file cannot be used, or the teacher has not been run.
    """
    base, recipes = read_variants(path)
    if not all(recipe.distill for recipe in recipes.values()):
        raise RecipeError(f"{path}: candidates are students; base must be a recipe with [distill]")
    runs: dict[str, list[Run]] = {}
    for variant, recipe in recipes.items():
        name = recipe.name if variant == BASE else variant
        named = replace(recipe, name=f"{path.stem}-{name}")
        runs[name] = [Run(base, corpora, weights, out, seed=s, recipe=named) for s in seeds]
    every = [run for each in runs.values() for run in each]
    for run in every:
        run.make(run.shared())
    with workers(max(run.trainings for run in every)) as pool:
        for started in [pool.submit(make_graphs, run) for run in every]:
            started.result()
    home = out / path.stem
    teacher_recipe, trained = every[0].teacher()
    graphs = {name: int8_graph(each[0].folder / "quantize") for name, each in runs.items()}
    graphs = {teacher_recipe.name: int8_graph(trained[0].parent / "quantize"), **graphs}
    window_s = min(WINDOW_S, every[0].recipe.windows.window_s)
    times_ms = time_graphs(graphs, window_s)
    rows = {}
    for name, graph in graphs.items():
        if name in runs:
            files = [run.folder / "train" / "confidence.json" for run in runs[name]]
            scores = [json.loads(file.read_text())["scores"] for file in files]
        else:
            scores = [score_teacher(every[0])]
        size = graph.stat().st_size + graph.with_name("model_int8.bin").stat().st_size
        rows[name] = {
            "mb": round(size / 1e6, 2),
            "ms": statistics.median(times_ms[name]),
            "ms_of_runs": [round(value, 4) for value in times_ms[name]],
            **{c: spread([columns(s)[c] for s in scores]) for c in columns(scores[0])},
        }
    for name in on_front(rows):
        rows[name]["front"] = True
    summary = {
        "front": path.name,
        "command": f"python -m export front {path.name} --seeds {','.join(map(str, seeds))}",
        "seeds": list(seeds),
        "teacher": teacher_recipe.name,
        "clips": len(every[0].speech.split.validation),
        "machine": {"processor": platform.machine(), "onnxruntime": onnxruntime.__version__},
        "window_s": window_s,
        "candidates": rows,
    }
    home.mkdir(exist_ok=True)
    (home / "front.json").write_text(json.dumps(summary, indent=1) + "\n")
    (home / "front.md").write_text(table(summary))
    draw(summary, home / "front.png")
    print(table(summary))


def make_graphs(run: Run) -> None:
    """Run the seeded stages up to the INT8 graphs; a process of its own does it."""
    stages = run.seeded()
    names = [stage.name for stage in stages]
    run.make(stages[: names.index("quantize") + 1])


def int8_graph(folder: Path) -> Path:
    """Return the INT8 graph for this processor."""
    return folder / (X86_GRAPH if platform.machine() in ("x86_64", "AMD64") else INT8_GRAPH)


def time_graphs(graphs: Mapping[str, Path], window_s: float) -> dict[str, list[float]]:
    """Time graphs in turns, on one thread: ms for so many seconds of noise, `ROUNDS` of each."""
    engines = {name: OnnxEngine(graph, threads=1) for name, graph in graphs.items()}
    noise = np.random.default_rng(0).normal(0, 0.1, (1, round(window_s * RATE_HZ)))
    samples = noise.astype(np.float32)
    times_ms: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in tqdm(range(ROUNDS), desc="latency", unit="round"):
        for name, engine in engines.items():
            engine.run(samples)  # brings its weights back into the caches that others used
            start = time.perf_counter()
            engine.run(samples)
            times_ms[name].append((time.perf_counter() - start) * 1e3)
    return times_ms


def score_teacher(run: Run) -> dict[str, Any]:
    """Return what a student's teacher scores on the validation speakers, whom it has not heard."""
    recipe, trained = run.teacher()
    clips = run.speech.split.validation
    network = load_classifier(recipe, run.weights, trained[0] / TEACHER / "model.safetensors")
    views = load_views(trained[0].parents[1] / "features")
    part = trained_part(recipe, network)
    probs = clip_probs(window_logits(part, views, run.speech.where(clips)))
    return score(probs, clips, run.speech.labels, run.speech.masks)


def on_front(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the candidates that no other equals in all and beats in something: fastest first.

    Args:
        rows: Each with ``ms``, ``mb`` and ``pooled`` with its ``mean``.
    """
    costs = {name: (row["ms"], row["mb"], -row["pooled"]["mean"]) for name, row in rows.items()}

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in costs.values()
        )

    kept = [name for name, mine in costs.items() if not beaten(mine)]
    return sorted(kept, key=lambda name: float(rows[name]["ms"]))


def table(summary: Mapping[str, Any]) -> str:
    """Return the candidates as a Markdown table, the fastest first."""
    rows = summary["candidates"]
    lines = [
        f"`{summary['command']}`: {summary['clips']} clips of validation speakers, whom neither "
        f"the students nor {summary['teacher']} have heard; INT8 graphs, "
        f"{summary['window_s']:g} s of audio on one thread, in turns. On the front: nothing as "
        "fast and as small is as accurate.",
        "",
        "| candidate | ms | MB | pooled UA | masked mean | front |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda name: float(rows[name]["ms"])):
        row = rows[name]
        cells = [shown(row[column]) for column in ("pooled", "masked mean")]
        cells = [f"{row['ms']:.2f}", f"{row['mb']:.1f}", *cells, "yes" if row.get("front") else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """Draw pooled UA against milliseconds, the area of a point being the size of the graph."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = summary["candidates"]
    for name, row in rows.items():
        colour = "C0" if row.get("front") else "lightgray"
        value, spread_of = row["pooled"]["mean"], row["pooled"]["sd"]
        axis.errorbar(row["ms"], value, yerr=spread_of, color=colour, capsize=3, zorder=1)
        axis.scatter(row["ms"], value, s=20 * row["mb"], color=colour, zorder=2)
        axis.annotate(
            f"{name}, {row['mb']:.1f} MB", (row["ms"], value), textcoords="offset points",
            xytext=(6, 6), fontsize=8,
        )  # fmt: skip
    line = [(rows[name]["ms"], rows[name]["pooled"]["mean"]) for name in on_front(rows)]
    axis.plot(*zip(*line, strict=True), color="C0", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(x=0.2)
    axis.set_xlabel(f"ms for {summary['window_s']:g} s of audio, INT8, one thread")
    axis.set_ylabel("pooled unweighted accuracy, validation speakers")
    figure.savefig(file, dpi=100)
    plt.close(figure)
