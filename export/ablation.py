"""What each part of a recipe is worth: variants of it, scored on speakers that they have not heard.

An ablation is a TOML file: the ``base`` recipe, and ``[variants.NAME]`` with the keys that differ.
All variants are trained in the same folds of the train and validation speakers; test speakers are
not touched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export import metrics
from export.confidence import clip_probs, fit_temperature
from export.crossfit import answer_folds, deal
from export.errors import RecipeError
from export.metrics import Floats
from export.recipe import Recipe, read_document, recipe_from
from export.run import features_of
from export.scores import score
from export.seeds import columns, spread
from export.speech import Speech
from export.splits import pooled
from export.stage import run_stage

BASE = "base"


def read_ablation(path: Path) -> dict[str, Recipe]:
    """Read the recipes of an ablation, the base first.

    Raises:
        RecipeError: A file cannot be read, a key is unknown, or a variant changes nothing.
    """
    document = read_document(path)
    unknown = document.keys() - {"base", "variants"}
    if unknown or not isinstance(document.get("base"), str) or not document.get("variants"):
        raise RecipeError(f"{path}: allowed are base = FILE and [variants.NAME], got {[*document]}")
    base = read_document(path.parent / document["base"])
    found = {BASE: recipe_from(base, path)}
    if not found[BASE].train or found[BASE].folds:
        raise RecipeError(f"{path}: base = {document['base']!r}; needed is a recipe with [train]")
    for name, changes in document["variants"].items():
        found[name] = recipe_from(merged(base, changes), path)
        if found[name] == found[BASE]:
            raise RecipeError(f"{path}: variant {name!r} is the base; change a key in it")
    return found


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a TOML document with some keys changed, tables within tables included."""
    result = dict(document)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inner, value) if both else value
    return result


def run_ablation(
    path: Path, corpora: Path, weights: Path | None, out: Path, seeds: Sequence[int]
) -> None:
    """Score all variants with all seeds: ``<out>/<stem>/ablation.json`` and ``.md``; resumable.

    Raises:
        RecipeError: The file cannot be used.
    """
    home = out / path.stem
    found: dict[str, list[dict[str, Any]]] = {}
    probs: dict[str, list[Floats]] = {}
    for name, recipe in read_ablation(path).items():
        speech = Speech(recipe, corpora)
        for seed in seeds:
            folder, key = home / f"{name}-seed{seed}", {"recipe": asdict(recipe), "seed": seed}
            make = partial(_score, speech, weights, home, seed)
            run_stage(folder, {**key, "speech": speech.key}, make)
            document = json.loads((folder / "scores.json").read_text())
            found.setdefault(name, []).append(document["scores"])
            probs.setdefault(name, []).append(np.array(document["probs"]))
            tqdm.write(f"{name}, seed {seed}: {_line(document['scores'])}")
    clips = (*speech.split.train, *speech.split.validation)
    summary = {
        "ablation": path.name,
        "command": f"python -m export ablate {path.name} --seeds {','.join(map(str, seeds))}",
        "seeds": list(seeds),
        "clips": len(clips),
        "variants": {
            name: {
                **{c: spread([columns(s)[c] for s in scores]) for c in columns(scores[0])},
                "nll": spread([s["pooled"]["nll"] for s in scores]),
                "gain": _gain(probs[name], probs[BASE], speech) if name != BASE else None,
            }
            for name, scores in found.items()
        },
    }
    (home / "ablation.json").write_text(json.dumps(summary, indent=1) + "\n")
    (home / "ablation.md").write_text(table(summary))
    print(table(summary))


def _score(speech: Speech, weights: Path | None, home: Path, seed: int, folder: Path) -> None:
    features = home / "features"
    # One cache for all variants in a row that hear the same; the next one makes its own there.
    run_stage(features, *features_of(speech, weights))
    clips = (*speech.split.train, *speech.split.validation)
    logits = answer_folds(speech, weights, features, clips, deal(speech), seed, folder)
    true = np.array([speech.labels.index(clip.emotion) for clip in clips])
    probs = clip_probs(logits, fit_temperature(logits, true))
    scores = score(probs, clips, speech.labels, speech.masks)
    document = {"scores": scores, "probs": probs.round(5).tolist()}
    (folder / "scores.json").write_text(json.dumps(document))


def _gain(probs: Sequence[Floats], base: Sequence[Floats], speech: Speech) -> dict[str, Any]:
    """Return the difference of pooled UA from the base's, with its interval over speakers."""
    clips = (*speech.split.train, *speech.split.validation)
    kept = set(pooled(clips))
    where = np.array([place for place, clip in enumerate(clips) if clip in kept])
    true = np.array([speech.labels.index(clips[place].emotion) for place in where])
    speakers = [clips[place].speaker_key for place in where]
    corpora = [clips[place].corpus for place in where]
    several = len(probs)
    return asdict(
        metrics.ua_difference(
            np.tile(true, several),
            np.concatenate([p[where].argmax(axis=1) for p in probs]),
            np.concatenate([p[where].argmax(axis=1) for p in base]),
            len(speech.labels),
            speakers * several,
            corpora * several,
        )
    )


def _line(scores: Mapping[str, Any]) -> str:
    whole = scores["pooled"]
    return f"pooled UA {whole['ua']['value']:.3f}, nll {whole['nll']:.3f}"


def table(summary: Mapping[str, Any]) -> str:
    """Return an ablation as a Markdown table."""
    variants = summary["variants"]
    names = [name for name in next(iter(variants.values())) if name != "gain"]
    lines = [
        f"`{summary['command']}`: {summary['clips']} clips of train and validation speakers, each "
        "answered by a model that has not heard its speaker. Unweighted accuracy, mean ± standard "
        "deviation over seeds; the gain is that of pooled UA, with its 95 % interval.",
        "",
        f"| variant | {' | '.join(names)} | gain |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for name, row in variants.items():
        cells = [
            f"{row[column]['mean']:.3f}"
            + ("" if row[column]["sd"] is None else f" ± {row[column]['sd']:.3f}")
            for column in names
        ]
        gain = row["gain"]
        cells.append(
            f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else ""
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
