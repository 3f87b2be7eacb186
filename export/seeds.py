"""One recipe with several seeds, and the table of what they scored."""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np

from export.run import Run
from export.scores import FOUR
from export.workers import workers

MEAN = "masked mean"
ADAPTED = {
    "adapted": "test speakers",
    "adapted_speakers_not_heard": "other speakers",
    "adaptation": "all speakers",
}
"""Whose adaptation a certificate, or ``folds.json``, tells under which key."""


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
        jobs = {pool.submit(_run_seed, run): run.seed for run in runs}
        failed = []
        for job in as_completed(jobs):
            if error := job.exception():
                failed.append(error)
                # The other seeds end first, which can take hours.
                print(f"seed {jobs[job]}: {error}", file=sys.stderr)
    if failed:
        raise failed[0]
    if only is None:
        summary = summarize(runs)
        home = runs[0].home
        (home / "seeds.json").write_text(json.dumps(summary, indent=1) + "\n")
        (home / "seeds.md").write_text(table(summary))
        print(table(summary))


def _run_seed(run: Run) -> None:
    run.make(run.seeded())


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the seeds of a finished recipe found out.

    Returns:
        ``systems``: `spread` of every system's unweighted accuracies over the seeds, and beside it,
        under ``intervals``, the interval over speakers of each seed's pooled one. ``confidence``:
        `spread` of calibration error, and of the share of wrong answers among the surest half and
        among all. ``adaptation``: `spread` of pooled UA by history, of the test speakers and of
        those that were not heard out of fold. Of a student what it kept of its teacher.
    """
    found = [run.scores() for run in runs]
    findings = [run.findings() for run in runs]
    numbers = [run.seed for run in runs]
    pooled = {system: [scores[system]["pooled"] for scores in found] for system in found[0]}
    first = runs[0]
    summary = {
        "recipe": first.recipe.name,
        "command": f"python -m export run {first.path.name} --seeds {','.join(map(str, numbers))}",
        "seeds": numbers,
        "systems": {
            system: {
                column: spread([columns(scores[system])[column] for scores in found])
                for column in columns(found[0][system])
            }
            for system in found[0]
        },
        "intervals": {
            system: [[each["ua"]["low"], each["ua"]["high"]] for each in rows]
            for system, rows in pooled.items()
        },
        "confidence": {
            system: {
                "ece": spread([each["ece"] for each in rows]),
                **{
                    f"ece if calibrated, {name}": spread(
                        [each["ece_if_calibrated"][name] for each in rows]
                    )
                    for name in ("mean", "high")
                },
                **{
                    f"wrong of {name}": spread([each["risk"][share] for each in rows])
                    for name, share in (("the surest half", "0.5"), ("all", "1.0"))
                },
            }
            for system, rows in pooled.items()
            if "ece" in rows[0]
        },
        "adaptation": {
            who: _adaptation([one[key] for one in findings])
            for key, who in ADAPTED.items()
            if key in findings[0]
        },
    }
    teachers = first.teacher_scores()
    if teachers:
        summary["teacher_seeds"] = len(teachers)
        summary["kept_of_teacher"] = {}
        for column in ("pooled", MEAN):
            kept, given = (
                np.mean([columns(scores["int8_x86"])[column] for scores in each])
                for each in (found, teachers)
            )
            summary["kept_of_teacher"][column] = float(kept / given)
    return summary


def _adaptation(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return rows of ``history``, ``utterances`` and `spread` of ``pooled_ua`` over the seeds."""
    return [
        {
            "history": rows[0]["history"],
            "utterances": rows[0]["utterances"],
            "pooled_ua": spread([row["pooled_ua"] for row in rows]),
        }
        for rows in zip(*seeds, strict=True)
    ]


def columns(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of the table that one system's scores fill."""
    masked = {name: row["masked"]["ua"]["value"] for name, row in scores["corpora"].items()}
    return {"pooled": scores["pooled"]["ua"]["value"], **masked, MEAN: scores["masked_ua_mean"]}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single value), and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation, "values": list(values)}


def shown(found: Mapping[str, Any], form: str = ".3f") -> str:
    """Return a `spread` as a table shows it: the mean, and the deviation where there is one."""
    more = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return f"{found['mean']:{form}}{more}"


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown tables."""
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
        lines.append(f"| {system} | {' | '.join(shown(cell) for cell in row.values())} |")
    if "kept_of_teacher" in summary:
        shares = summary["kept_of_teacher"].items()
        kept = " and ".join(f"{share:.1%} of its {column} UA" for column, share in shares)
        count = summary["teacher_seeds"]
        lines += ["", f"INT8 keeps of its teacher's INT8 ({count} seeds) {kept}."]
    lines += [
        "",
        "How sure it is: expected calibration error, what of it a perfectly calibrated model would "
        "show by chance on as few clips (on average, and at most in 95 of 100 cases), and how many "
        "answers are wrong.",
        "",
    ]
    confidence = summary["confidence"]
    of_what = list(next(iter(confidence.values())))
    lines += [f"| system | {' | '.join(of_what)} |", f"|---|{'---|' * len(of_what)}"]
    for system, row in confidence.items():
        lines.append(f"| {system} | {' | '.join(shown(cell) for cell in row.values())} |")
    for who, rows in summary["adaptation"].items():
        cells = {(row["history"], row["utterances"]): shown(row["pooled_ua"]) for row in rows}
        counts = sorted({count for _, count in cells})
        none = cells["none", 0]
        lines += ["", f"Adapting to the speaker, pooled UA after so many utterances, {who}.", ""]
        lines += [f"| history | {' | '.join(map(str, counts))} |", f"|---|{'---|' * len(counts)}"]
        for history in dict.fromkeys(name for name, _ in cells if name != "none"):
            each = [none, *(cells.get((history, count), "") for count in counts[1:])]
            lines.append(f"| {history} | {' | '.join(each)} |")
    return "\n".join(lines) + "\n"
