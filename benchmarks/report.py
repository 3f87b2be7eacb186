"""Results as Markdown and as a plot, from the JSON alone.

A result is a JSON object: ``schema``, ``benchmark``, ``date``, ``commit``, ``machine``,
``versions``, ``protocol`` and what was measured. A cell that holds ``not_measured`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ser.errors import EdgeSerError, MissingDependency

SCHEMA = 1


def check(result: object) -> dict[str, Any]:
    """Return a result that this module can show.

    Raises:
        EdgeSerError: It is none.
    """
    if isinstance(result, dict) and (result.get("schema"), result.get("benchmark")) == (
        SCHEMA,
        "latency",
    ):
        return result
    raise EdgeSerError(
        f"this is no result of `python -m benchmarks latency` (schema {SCHEMA}); measure again"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def ms(value: float) -> str:
    """Return milliseconds with about three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def latency_markdown(result: dict[str, Any]) -> str:
    """Return the result of `benchmarks.latency.measure` as Markdown."""
    protocol, host, rows = result["protocol"], result["machine"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    reference = rows[0]["system"]
    return "\n".join(
        [
            f"# Latency of {protocol['window_s']:g} s of audio\n",
            f"{result['date']}, commit {result['commit']}. {host['cpu']} ({host['architecture']}, "
            f"VNNI: {'yes' if host['vnni'] else 'no'}), {host['cores']} cores, "
            f"{host['memory_mb'] / 1e3:.1f} GB; load average before: {host['load_average']}. "
            f"{versions}.\n",
            f"One window of noise, front ends included; {protocol['runs']} rounds, in each of which "
            "every system takes its turn (one run to warm the caches, then the timed one). "
            f"Speedup: against {reference} with as many threads, the median of the ratios in each "
            "round.\n",
            _systems(rows),
            "What `Recognizer.predict` on an array adds to the bare session run (median of the "
            "differences):\n",
            _predict(rows),
            "Each system in a process of its own: importing and loading, first run, peak memory. "
            "(Random weights are drawn, not read.)\n",
            _loads(result["loads"]),
            "Whole processes, in turns, with files in memory:\n",
            _cold(result["cold"]),
            "Bundles:\n",
            _hashes(rows),
        ]
    )


def _systems(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        cell = [_name(row), str(row["threads"])]
        if "not_measured" in row:
            cells.append([*cell, *[_reason(row)], *[""] * 4])
            continue
        stats = row["stats"]["engine"]
        times = [ms(stats[f"p{percent}_ms"]) for percent in (50, 90, 99)]
        speedup = f"{row['speedup']:.1f}x" if row["speedup"] else "not measured"
        cells.append([*cell, *times, speedup, str(len(row["samples_ms"]["engine"]))])
    return table(["system", "threads", "p50 ms", "p90 ms", "p99 ms", "speedup", "runs"], cells)


def _predict(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        if "predict_adds_ms" in row:
            p50_ms = (row["stats"][turn]["p50_ms"] for turn in ("engine", "end_to_end"))
            adds = f"{row['predict_adds_ms']:.3f}"
            cells.append([_name(row), str(row["threads"]), *map(ms, p50_ms), adds])
    return table(["system", "threads", "session p50 ms", "predict p50 ms", "adds ms"], cells)


def _loads(loads: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in loads:
        if "not_measured" in row:
            cells.append([_name(row), str(row["threads"]), _reason(row), "", ""])
        else:
            times = ms(row["load_ms"]), ms(row["first_run_ms"])
            peak = f"{row['peak_memory_mb']:.0f}"
            cells.append([_name(row), str(row["threads"]), *times, peak])
    return table(["system", "threads", "load ms", "first run ms", "peak memory MB"], cells)


def _cold(cold: dict[str, Any]) -> str:
    if "not_measured" in cold:
        return table(["command", "p50 ms"], [["cold start", _reason(cold)]])
    (predict, stats), (imports, least) = cold["stats"].items()
    runs = str(len(cold["samples_ms"][predict]))
    return table(
        ["command", "p50 ms", "ratio", "runs"],
        [
            [f"`{predict}`", ms(stats["p50_ms"]), f"{cold['ratio']:.2f}x", runs],
            [f"`{imports}`", ms(least["p50_ms"]), "1", runs],
        ],
    )


def _hashes(rows: Sequence[dict[str, Any]]) -> str:
    files = {
        (row["system"], row["detail"], row["graph_sha256"], row["bundle_sha256"]): None
        for row in rows
        if "graph_sha256" in row
    }  # a dict, for it keeps the order
    header = ["system", "graph", "SHA-256 of the graph", "SHA-256 of metadata.json"]
    return table(header, list(files))


def _name(row: dict[str, Any]) -> str:
    return f"{row['system']} ({row['detail']})" if "detail" in row else row["system"]


def _reason(row: dict[str, Any]) -> str:
    return f"not measured: {row['not_measured']}"


def latency_plot(result: dict[str, Any], file: Path) -> None:
    """Draw p50 as bars, with a line up to p99, on a logarithmic axis.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: nothing global, no display
    except ImportError as exc:
        line = "matplotlib is not installed; run: pip install matplotlib"
        raise MissingDependency(line) from exc
    rows = [row for row in reversed(result["rows"]) if "stats" in row]
    stats = [row["stats"]["engine"] for row in rows]
    p50_ms = [values["p50_ms"] for values in stats]
    tails_ms = [values["p99_ms"] - values["p50_ms"] for values in stats]
    names = [f"{row['system']}, {row['threads']} thr." for row in rows]
    colours = [f"C{row['threads'] - 1}" for row in rows]
    figure = Figure(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    # Positions, not names: two bundles may have one name.
    axes.barh(range(len(rows)), p50_ms, xerr=[[0] * len(rows), tails_ms], color=colours)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms for {result['protocol']['window_s']:g} s of audio: p50, line to p99")
    axes.set_title(result["machine"]["cpu"])
    figure.savefig(file, dpi=150)
