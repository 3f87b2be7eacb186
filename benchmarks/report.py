"""Results as Markdown and as a plot, from the JSON alone; ``not_measured`` in it is a reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ser.errors import MissingDependency

Row = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left and the others right; short rows filled."""
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latency_markdown(result: Row) -> str:
    """Return the result of `benchmarks.latency.measure` as Markdown."""
    protocol, rows = result["protocol"], result["rows"]
    loads = [_start(row) + (_reason(row) or _load(row)) for row in result["loads"]]
    return f"""# Latency of {protocol["window_s"]:g} s of audio

{origin(result)}

Noise, front ends included. {protocol["runs"]} rounds; in each of them every system takes its \
turn: one run to warm the caches, then the timed one. Speedup is against {rows[0]["system"]} with \
as many threads, the median of the ratios of the rounds; what `Recognizer.predict` on an array \
adds to the bare session run is the median of the differences.

{table(_TIMES, [_start(row) + (_reason(row) or _times(row)) for row in rows])}
Each system in a process of its own. Loading is with imports; random weights are drawn, not read.

{table(["system", "threads", "load ms", "first run ms", "peak memory MB"], loads)}
Whole processes, in turns, their files in memory.

{table(["command", "p50 ms", "ratio", "runs"], _cold(result["cold"]))}
{table(["system", "graph", "SHA-256 of the graph", "SHA-256 of metadata.json"], _files(rows))}"""


def origin(result: Row) -> str:
    """Return when, where and with what a result was measured, as a line of Markdown."""
    host = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['date']}, commit {result['commit']}. {host['cpu']} ({host['architecture']}, "
        f"VNNI: {'yes' if host['vnni'] else 'no'}), {host['cores']} cores, "
        f"{host['memory_mb'] / 1e3:.1f} GB, load average before: {host['load_average']}. "
        f"{versions}."
    )


_TIMES = ["system", "threads", "p50 ms", "p90 ms", "p99 ms", "speedup", "predict adds ms", "runs"]


def _times(row: Row) -> list[str]:
    stats = row["stats"]["engine"]
    return [
        *(_ms(stats[f"p{percent}_ms"]) for percent in (50, 90, 99)),
        f"{row['speedup']:.1f}x" if row["speedup"] else "not measured",
        f"{row['predict_adds_ms']:.3f}" if "predict_adds_ms" in row else "",
        str(len(row["samples_ms"]["engine"])),
    ]


def _load(row: Row) -> list[str]:
    return [_ms(row["load_ms"]), _ms(row["first_run_ms"]), f"{row['peak_memory_mb']:.0f}"]


def _cold(cold: Row) -> list[list[str]]:
    if reason := _reason(cold):
        return [["cold start", *reason]]
    rows = zip(cold["stats"].items(), cold["ratios"], strict=True)
    return [
        [
            f"`{command}`",
            _ms(stats["p50_ms"]),
            f"{ratio:.2f}x",
            str(len(cold["samples_ms"][command])),
        ]
        for (command, stats), ratio in rows
    ]


def _files(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    keys = ("system", "graph", "graph_sha256", "bundle_sha256")
    found = [tuple(row[key] for key in keys) for row in rows if "graph" in row]
    return list(dict.fromkeys(found))  # once, not for each number of threads


def _start(row: Row) -> list[str]:
    detail = row.get("graph") or row.get("detail")
    return [f"{row['system']} ({detail})" if detail else row["system"], str(row["threads"])]


def _reason(row: Row) -> list[str]:
    return [f"not measured: {row['not_measured']}"] if "not_measured" in row else []


def _ms(value: float) -> str:
    """Return milliseconds with three digits or all that are whole."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def peers_markdown(result: Row) -> str:
    """Return the result of `benchmarks.peers.measure` as Markdown."""
    protocol, rows = result["protocol"], result["rows"]
    lengths = [f"{seconds:g} s" for seconds in protocol["windows_s"]]
    columns = [
        f"{length}: {name}" for length in lengths for name in ("p50 ms", "p90 ms", "speedup")
    ]
    times = "\n".join(
        f"{count} thread{'s' if count > 1 else ''}:\n\n"
        + table(["system", *columns], _by_length([r for r in rows if r["threads"] == count]))
        for count in dict.fromkeys(row["threads"] for row in rows)
    )
    costs = ["file MB", f"peak memory MB, {protocol['memory_window_s']:g} s"]
    kept = [f"{length}: {name}" for name in ("labels equal", "cosine") for length in lengths]
    details = {row["system"]: row["detail"] for row in rows if "detail" in row}
    settings = "".join(f"- {name}: {detail}\n" for name, detail in details.items())
    return f"""# Peers: {result["subject"]["network"]}

{origin(result)}

{result["subject"]["calibration"]} {result["subject"]["agreement"]}

Noise of each length, front ends included. {protocol["runs"]} rounds; in each of them every system \
takes its turn: one run to warm the caches, then the timed one. Speedup is against \
{rows[0]["system"]} with as many threads, the median of the ratios of the rounds.

{times}
The file with its weights; each system in a process of its own. Labels and hidden states of \
{protocol["clips"]} windows of each length against {rows[0]["system"]}; the cosine is the mean \
over the frames that the head reads.

{table(["system", *costs, *kept], _kept(result))}
Settings:

{settings}"""


def _by_length(rows: Sequence[Row]) -> list[list[str]]:
    lines: dict[str, list[str]] = {}
    for row in rows:  # of one system, in the order of the lengths
        line = lines.setdefault(row["system"], [row["system"]])
        if "not_measured" in row:
            line[1:] = _reason(row)
            continue
        stats = row["stats"]["engine"]
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else "not measured"
        line += [_ms(stats["p50_ms"]), _ms(stats["p90_ms"]), speedup]
    return list(lines.values())


def _kept(result: Row) -> list[list[str]]:
    answers = {row["system"]: row for row in result["answers"]}
    lines = []
    for load in result["loads"]:
        line = [load["system"]]
        lines.append(line)
        if "not_measured" in load:
            line += _reason(load)
            continue
        line += [f"{load['file_mb']:.1f}", f"{load['peak_memory_mb']:.0f}"]
        answer = answers[load["system"]]
        if "not_measured" in answer:
            line += _reason(answer)
            continue
        line += [f"{one['labels_equal']:.1%}" for one in answer["windows"]]
        line += [f"{one['frame_cosine']:.4f}" for one in answer["windows"]]
    return lines


def latency_plot(result: Row, file: Path) -> None:
    """Draw p50 as bars, with a line up to p99, on a logarithmic axis.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    rows = [row for row in reversed(result["rows"]) if "stats" in row]
    stats = [row["stats"]["engine"] for row in rows]
    p50_ms = [values["p50_ms"] for values in stats]
    tails_ms = [values["p99_ms"] - values["p50_ms"] for values in stats]
    places = range(len(rows))  # not names, for two bundles may share one
    figure = _figure(8, 1 + 0.35 * len(rows))
    axes = figure.subplots()
    colours = [f"C{row['threads'] - 1}" for row in rows]
    axes.barh(places, p50_ms, xerr=[[0] * len(rows), tails_ms], color=colours)
    axes.set_yticks(places, [f"{row['system']}, threads: {row['threads']}" for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel(f"ms for {result['protocol']['window_s']:g} s of audio: p50, line to p99")
    axes.set_title(result["machine"]["cpu"])
    figure.savefig(file, dpi=150)


def peers_plot(result: Row, file: Path) -> None:
    """Draw p50 as bars, with a line up to p90: a panel a length, the first number of threads.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    threads, lengths = result["rows"][0]["threads"], result["protocol"]["windows_s"]
    rows = [row for row in result["rows"] if "stats" in row and row["threads"] == threads]
    names = list(dict.fromkeys(row["system"] for row in reversed(rows)))
    figure = _figure(3 + 3 * len(lengths), 1 + 0.35 * len(names))
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, seconds in zip(panels, lengths, strict=True):
        measured = [row for row in rows if row["window_s"] == seconds]
        stats = [row["stats"]["engine"] for row in measured]
        p50_ms = [values["p50_ms"] for values in stats]
        tails_ms = [values["p90_ms"] - values["p50_ms"] for values in stats]
        places = [names.index(row["system"]) for row in measured]
        axes.barh(places, p50_ms, xerr=[[0] * len(places), tails_ms])
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(f"ms for {seconds:g} s: p50, line to p90")
    figure.suptitle(f"{result['subject']['network']}, threads: {threads}")
    figure.savefig(file, dpi=150)


def accuracy_plot(result: Row, file: Path) -> None:
    """Draw equal labels by condition, and what UA is lost with its interval: a colour a system.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    conditions = list(dict.fromkeys(row["condition"] for row in result["rows"]))
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    figure = _figure(12, 2 + 0.12 * len(systems) * len(conditions))
    labels, lost = figure.subplots(1, 2, sharey=True)
    for number, system in enumerate(systems):
        rows = [row for row in result["rows"] if row["system"] == system]
        places = [conditions.index(row["condition"]) + 0.8 * number / len(systems) for row in rows]
        labels.plot([100 * row["labels_equal"] for row in rows], places, "o", label=system)
        points = [[100 * row["difference"][k] for k in ("value", "low", "high")] for row in rows]
        tails = [[v - low for v, low, _ in points], [high - v for v, _, high in points]]
        lost.errorbar([v for v, *_ in points], places, xerr=tails, fmt="o", capsize=2)
    labels.set_yticks(range(len(conditions)), conditions)
    labels.invert_yaxis()
    labels.set_xlabel("% of the labels as full precision has them")
    figure.legend(loc="outside lower center", ncols=len(systems))
    lost.axvline(0, color="gray", linewidth=1)
    lost.set_xlabel("points of UA more than full precision, 95 % intervals")
    figure.suptitle(f"{result['recipe']}, seed {result['seed']}")
    figure.savefig(file, dpi=150)


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, nothing global
    except ImportError as exc:
        line = 'matplotlib is not installed; run: pip install -e ".[bench]"'
        raise MissingDependency(line) from exc
    return Figure(figsize=(width, height), layout="constrained")
