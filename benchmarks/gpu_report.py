"""What `benchmarks gpu` found, as Markdown and as a plot, from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from benchmarks.report import Row, in_ms, new_figure, origin, table
from benchmarks.runtimes import RUNTIMES

_FLOORS = ["graph", "GMAC INT8", "half", "float32", "weights MB", "floor"]
_CELLS = [
    "batch, precision, runtime", "p50 ms", "p99 ms", "windows/s", "of the floor", "MB", "off",
    "labels equal", "UA",
]  # fmt: skip


def gpu_markdown(result: Row) -> str:
    """Return the result of `benchmarks.gpu.measure` as Markdown."""
    protocol, rows = result["protocol"], result["rows"]
    said = "; ".join(f"{name} {value}" for name, value in result["gpu"].items() if name != "name")
    models = list(dict.fromkeys(row["model"] for row in rows))
    return f"""# GPU: {result["gpu"].get("name", "not known")}

{said.replace("_", " ")}. {origin(result)}

Noise of {protocol["window_s"]:g} s, front ends included, from samples on the host to logits on \
the host, synchronised; {protocol["runs"]} runs count, behind others that warm up. The floor is \
the roofline's: all multiplications at their dense peaks, or all weights read once, whichever \
takes longer. Off is the largest difference of a logit from the processor's, as a part of the \
largest logit; labels are held against the processor's as well, clip by clip.

{table(_FLOORS, [_floor(row) for row in result["floors"]])}
{"".join(_model(name, [row for row in rows if row["model"] == name]) for name in models)}"""


def _floor(row: Row) -> list[str]:
    start = f"{row['model']}, {row['graph']} ({row['weights']})"
    if "macs" not in row:
        return [start, f"not measured: {row['not_measured']}"]
    macs = [f"{row['macs'][name] / 1e9:.3f}" for name in ("int8", "fp16", "fp32")]
    floor = ", ".join(
        f"{in_ms(ms)} ms (batch {batch})" for batch, ms in row.get("floor_ms", {}).items()
    )
    reason = f"not measured: {row.get('not_measured')}"
    return [start, *macs, f"{row['weight_bytes'] / 1e6:.1f}", floor or reason]


def _model(name: str, rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row["batch"])
    return f"""
## {name}

{table(_CELLS, [_cell(row) for row in ordered])}"""


def _cell(row: Row) -> list[str]:
    start = f"{row['batch']}, {row['precision']}, {RUNTIMES[row['runtime']].title}"
    if "stats" not in row:
        return [start, f"not measured: {row['not_measured']}"]
    accuracy, off = row["accuracy"], row["off"]
    equal = "labels_equal" in accuracy
    return [
        start,
        in_ms(row["stats"]["p50_ms"]),
        in_ms(row["stats"]["p99_ms"]),
        f"{row['windows_per_s']:.0f}",
        f"{row['of_floor']:.1f}x" if "of_floor" in row else "not measured",
        f"{row['size_mb']:.1f}",
        f"{off:.1g}" if isinstance(off, float) else f"not measured: {off['not_measured']}",
        f"{accuracy['labels_equal']:.1%} of {accuracy['clips']}" if equal else "not measured",
        f"{accuracy['ua']:.3f}" if "ua" in accuracy else "not measured",
    ]


def gpu_plot(result: Row, file: Path) -> None:
    """Draw p50 as bars, with a line up to p99 and a mark at the floor: a panel a model and batch.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    measured = [row for row in result["rows"] if "stats" in row]
    models, batches, names = (
        list(dict.fromkeys(map(key, measured)))
        for key in (itemgetter("model"), itemgetter("batch"), _bar)
    )
    figure = new_figure(4 + 3 * len(models), 1 + len(batches) * (1 + 0.25 * len(names)))
    figure.suptitle(result["gpu"].get("name", "GPU not known"))
    places = [(model, batch) for batch in batches for model in models]
    panels = figure.subplots(len(batches) or 1, len(models) or 1, sharey=True, squeeze=False)
    for axes, place in zip(panels.flat, places, strict=False):  # one panel where nothing is shown
        rows = [row for row in measured if (row["model"], row["batch"]) == place]
        lines = [names.index(_bar(row)) for row in rows]
        p50_ms = [row["stats"]["p50_ms"] for row in rows]
        tails_ms = [row["stats"]["p99_ms"] - row["stats"]["p50_ms"] for row in rows]
        axes.barh(lines, p50_ms, xerr=[[0] * len(rows), tails_ms])
        axes.plot([row.get("floor_ms", math.nan) for row in rows], lines, "k|", markersize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set_xscale("log")
        axes.set_title("{}, batch {}".format(*place))
        axes.set_xlabel("ms: p50, line to p99, mark at the floor")
    if places:
        panels[0][0].invert_yaxis()  # shared
    else:
        panels[0][0].set_title("no cell was measured")
    figure.savefig(file, dpi=150)


def _bar(row: Row) -> str:
    return f"{row['precision']} {RUNTIMES[row['runtime']].title}"
