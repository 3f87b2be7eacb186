"""Whether INT8 answers as full precision does, where there are clips enough to tell.

Every clip of every speaker is answered by a head that has not heard the speaker (see
`benchmarks.unheard`), in full precision, by our INT8 and by what other tools make of the same
graph. That is paired and thousands of clips, which it takes to tell a difference of a few tenths of
a point from none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.unheard import AS_IT_IS, FP32, OURS, PEERS, answer, parts
from export import metrics
from export.corpora import Clip
from export.errors import RecipeError
from export.run import Run
from export.variants import read_variants
from export.workers import workers

PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "transformers", "nvidia-modelopt")

EQUAL = 0.985  # of the labels, under every condition
LOST, LOWEST = -0.003, -0.01  # of the UA: the value, and the lower end of its interval


def measure(
    path: Path,
    corpora: Path,
    weights: Path | None,
    out: Path,
    seed: int,
    variants: Path | None = None,
    tools: Sequence[str] = PEERS,
) -> dict[str, Any]:
    """Compare graphs with full precision.

    Args:
        path: A recipe with [train] that was run with the same ``out`` and seed.
        corpora: Folder of the corpora.
        weights: Folder of pretrained checkpoints.
        out: Where the run left its results; takes the graphs and answers as well.
        seed: Of the run.
        variants: A file of variants of the recipe's [quantize]. They take the place of the other
            tools, and answer for clips as they are only.
        tools: The other tools, of `PEERS`.

    Returns:
        The JSON object that `table` shows.

    Raises:
        RecipeError: The recipe has no folds, or was not run.
    """
    run = Run(path, corpora, weights, out, seed=seed)
    trained = run.folder / "train"
    if not run.recipe.train or not (trained / "confidence.json").is_file():
        raise RecipeError(
            f"no heads in {str(trained)!r}; run a recipe with [train] first: python -m export run "
            f"{path} --out {out} --seeds {seed}"
        )
    temperature = json.loads((trained / "confidence.json").read_text())["temperature"]
    settings, home = {OURS: run.recipe.quantize}, run.folder / "accuracy"
    if variants:
        settings = {name: one.quantize for name, one in read_variants(variants)[1].items()}
        home = run.folder / f"accuracy-{variants.stem}"
    asked = parts(run.speech, trained)
    ask = partial(answer, run.speech, weights, temperature, settings, None if variants else tools)
    with workers() as pool:
        started = [pool.submit(ask, part, home / part.head.name) for part in asked]
        found = [job.result() for job in tqdm(started, desc="heads", unit="head")]
    words = f" --variants {variants.name}" if variants else ""
    if not variants and tuple(tools) != PEERS:
        words = f" --tools {','.join(tools) or repr('')}"
    return {
        "schema": 1,
        "benchmark": "accuracy",
        "command": f"python -m benchmarks accuracy {path.name} --seed {seed}{words}",
        **machine.provenance(PACKAGES),
        "recipe": run.recipe.name,
        "seed": seed,
        "settings": {name: asdict(how) for name, how in settings.items()},
        "given_back": {
            part.head.name: one["given_back"] for part, one in zip(asked, found, strict=True)
        },
        "refused": found[0]["refused"],
        "rows": [
            row
            for condition in found[0]["conditions"]
            for row in rows(
                condition,
                [one["conditions"][condition] for one in found],
                [part.asked for part in asked],
                run.speech.labels,
            )
        ],
    }


def rows(
    condition: str,
    found: Sequence[Mapping[str, Any]],
    asked: Sequence[Sequence[Clip]],
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Compare every system with full precision under one condition.

    Args:
        condition: Its name.
        found: For every head the places of its ``clips``, and ``probs`` by system.
        asked: The clips that these are places of.
        labels: In the order of the probs.

    Returns:
        For each system how many ``clips``, the share of ``labels_equal``, the ``divergence`` of its
        answers in nats, its ``ua`` and that of ``fp32``, and their ``difference`` with its
        interval, paired, by bootstrap over speakers.
    """
    clips = [of[place] for one, of in zip(found, asked, strict=True) for place in one["clips"]]
    true = np.array([labels.index(clip.emotion) for clip in clips])
    systems = found[0]["probs"]
    probs = {
        name: np.concatenate([np.array(one["probs"][name]) for one in found if one["clips"]])
        for name in systems
    }
    exact = probs.pop(FP32)
    before = exact.argmax(axis=1)
    heard = [clip.speaker_key for clip in clips], [clip.corpus for clip in clips]

    def ua(answers: Any) -> float:
        return float(metrics.ua(metrics.confusion(true, answers, len(labels))))

    return [
        {
            "condition": condition,
            "system": name,
            "clips": len(clips),
            "labels_equal": float((one.argmax(axis=1) == before).mean()),
            "divergence": metrics.divergence(exact, one),
            "fp32": ua(before),
            "ua": ua(one.argmax(axis=1)),
            "difference": asdict(
                metrics.ua_difference(true, one.argmax(axis=1), before, len(labels), *heard)
            ),
        }
        for name, one in probs.items()
    ]


def holds(found: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a system's rows keep labels and UA; see `EQUAL`, `LOST` and `LOWEST`."""
    (plain,) = [row["difference"] for row in found if row["condition"] == AS_IT_IS]
    equal = min(row["labels_equal"] for row in found)
    return bool(equal >= EQUAL and plain["value"] >= LOST and plain["low"] >= LOWEST)


def accuracy_markdown(result: Mapping[str, Any]) -> str:
    """Return what `measure` found as a Markdown table."""
    lines = [
        f"`{result['command']}`: {result['recipe']}, seed {result['seed']}; every clip is answered "
        "by a head that has not heard its speaker.",
        "",
        "| system | condition | clips | equal labels | divergence, nats | UA FP32 | UA | "
        "difference, points (95 %) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["system"] != OURS):
        points = [100 * row["difference"][key] for key in ("value", "low", "high")]
        cells = [
            row["system"], row["condition"], str(row["clips"]), f"{row['labels_equal']:.1%}",
            f"{row['divergence']:.1e}", f"{row['fp32']:.3f}", f"{row['ua']:.3f}",
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*points),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not measured: {why} | | | | | | |" for name, why in
              result["refused"].items()]  # fmt: skip
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    kept = [name for name in systems if holds([r for r in result["rows"] if r["system"] == name])]
    lines += [
        "",
        f"Asked are {EQUAL:.1%} of the labels under every condition, and of clips as they are a "
        f"UA difference of {100 * LOST:.1f} points or more, its interval from {100 * LOWEST:.1f}. "
        f"That holds: {', '.join(kept) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"
