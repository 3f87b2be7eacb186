"""One recipe with several seeds, and the table of what they scored."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.run import Run
from export.scores import FOUR
from export.workers import workers

MEAN = "masked mean"


def run_seeds(
    recipe: Path,
    corpora: Path,
    weights: Path | None,
    out: Path,
    seeds: Sequence[int],
    *,
    only: str | None = None,
    start: str | None = None,
) -> None:
    """Run a recipe once for every seed; resumable as each run is.

    What all seeds share is made first, by all cores. Then each seed trains in one process, or in
    two, of one thread each, as many at a time as there are cores.

    Raises:
        EdgeSerError: The recipe cannot be run, or a seed missed the gate.
    """
    runs = [Run(recipe, corpora, weights, out, seed=s, only=only, start=start) for s in seeds]
    for run in runs:
        run.forget()
    shared = runs[0].shared()
    runs[0].make(shared)
    if only in [stage.name for stage in shared]:
        return
    if len(seeds) == 1:
        runs[0].make(runs[0].seeded())
        return
    for run in runs[1:]:
        run.keys.update(runs[0].keys)
    # Training by processor time learns less from it where processes share a core.
    with workers(runs[0].trainings) as pool:
        for result in [pool.submit(_run_seed, run) for run in runs]:
            result.result()
    if only is None:
        summary = summarize(runs)
        home = runs[0].home
        (home / "seeds.json").write_text(json.dumps(summary, indent=1) + "\n")
        (home / "seeds.md").write_text(table(summary))
        print(table(summary))


def _run_seed(run: Run) -> None:
    run.make(run.seeded())


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Return mean and spread over seeds of every system, and what a student kept of its teacher."""
    found = [run.scores() for run in runs]
    summary = {
        "recipe": runs[0].recipe.name,
        "seeds": [run.seed for run in runs],
        "systems": {
            system: {
                column: spread([columns(scores[system])[column] for scores in found])
                for column in columns(found[0][system])
            }
            for system in found[0]
        },
    }
    teachers = runs[0].teacher_scores()
    if teachers:
        kept, given = (
            np.mean([columns(scores["int8_x86"])[MEAN] for scores in each])
            for each in (found, teachers)
        )
        summary["masked_ua_kept_of_teacher"] = float(kept / given)
        summary["teacher_seeds"] = len(teachers)
    return summary


def columns(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of the table that one system's scores fill."""
    masked = {name: row["masked"]["ua"]["value"] for name, row in scores["corpora"].items()}
    return {"pooled": scores["pooled"]["ua"]["value"], **masked, MEAN: scores["masked_ua_mean"]}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single value), and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation, "values": list(values)}


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    systems = summary["systems"]
    names = list(next(iter(systems.values())))
    seeds = ", ".join(map(str, summary["seeds"]))
    lines = [
        f"{summary['recipe']}, seeds {seeds}: unweighted accuracy, mean ± standard deviation over "
        "seeds. `pooled` answers among all labels, the corpora among their own; the last column is "
        f"the mean over {', '.join(FOUR)}.",
        "",
        f"| system | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for system, row in systems.items():
        cells = [
            f"{cell['mean']:.3f}" + ("" if cell["sd"] is None else f" ± {cell['sd']:.3f}")
            for cell in row.values()
        ]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    if "masked_ua_kept_of_teacher" in summary:
        kept, count = summary["masked_ua_kept_of_teacher"], summary["teacher_seeds"]
        lines += ["", f"INT8 keeps {kept:.1%} of its teacher's INT8 {MEAN} ({count} seeds)."]
    return "\n".join(lines) + "\n"
