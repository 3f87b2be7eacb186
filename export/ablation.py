"""What each part of a recipe is worth: variants of it, scored on speakers that they have not heard.

Variants with [train] are trained in the same folds of the train and validation speakers; students,
which take longer, are trained once and answer the validation speakers. Test speakers are not
touched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export import metrics
from export.confidence import clip_probs, fit_temperature
from export.corpora import Clip
from export.crossfit import Logits, answer_folds
from export.distill import fit_student
from export.errors import RecipeError
from export.metrics import Floats
from export.model import load_classifier
from export.run import Run, Stage
from export.scores import score
from export.seeds import columns, shown, spread
from export.speech import Speech
from export.splits import pooled
from export.stage import key_of, run_stage
from export.train import window_logits
from export.variants import BASE, read_variants
from export.views import load_views
from export.workers import workers


def run_ablation(
    path: Path, corpora: Path, weights: Path | None, out: Path, seeds: Sequence[int]
) -> None:
    """Score all variants with all seeds: ``<out>/<stem>/ablation.json`` and ``.md``; resumable.

    Raises:
        RecipeError: The file cannot be used.
    """
    home = out / path.stem
    base, recipes = read_variants(path)
    if any(recipe.folds for recipe in recipes.values()):
        raise RecipeError(f"{path}: a recipe with [folds] has no variants; leave [folds] out")
    jobs = []
    for name, recipe in recipes.items():
        for seed in seeds:
            run = Run(base, corpora, weights, out, seed=seed, recipe=recipe)
            jobs.append((run, home / f"{name}-seed{seed}"))
    if recipes[BASE].train:  # each trains on all cores
        heard = Run(base, corpora, weights, out).shared()[0]
        for run, folder in jobs:
            features = run.shared()[0]
            if features.reads != heard.reads:
                # One cache for all variants in a row that hear the same; the next makes its own.
                features = replace(features, folder=home / "features")
            _score_heads(run, features, folder)
    else:
        for run, _ in jobs:
            run.make(run.shared())
        with workers() as pool:
            for started in [pool.submit(_score_student, run, folder) for run, folder in jobs]:
                started.result()
    found: dict[str, list[dict[str, Any]]] = {}
    probs: dict[str, list[Floats]] = {}
    for name in recipes:
        for seed in seeds:
            document = json.loads((home / f"{name}-seed{seed}" / "scores.json").read_text())
            found.setdefault(name, []).append(document["scores"])
            probs.setdefault(name, []).append(np.array(document["probs"]))
    speech = jobs[0][0].speech
    clips = _asked(speech)
    summary = {
        "ablation": path.name,
        "command": f"python -m export ablate {path.name} --seeds {','.join(map(str, seeds))}",
        "seeds": list(seeds),
        "clips": len(clips),
        "variants": {
            name: {
                **{c: spread([columns(s)[c] for s in scores]) for c in columns(scores[0])},
                "nll": spread([s["pooled"]["nll"] for s in scores]),
                "gain": None if name == BASE else _gain(probs[name], probs[BASE], speech),
            }
            for name, scores in found.items()
        },
    }
    (home / "ablation.json").write_text(json.dumps(summary, indent=1) + "\n")
    (home / "ablation.md").write_text(table(summary))
    print(table(summary))


def _asked(speech: Speech) -> tuple[Clip, ...]:
    """Return the clips that variants answer."""
    return (*(speech.split.train if speech.recipe.train else ()), *speech.split.validation)


def _score_heads(run: Run, features: Stage, folder: Path) -> None:
    """Make ``scores.json`` of a variant with [train]."""
    speech, weights, seed = run.speech, run.weights, run.seed

    def make(partial_folder: Path) -> None:
        run.make([features])
        clips = _asked(speech)
        assert run.recipe.train  # only such variants are scored here
        fold = speech.split.deal(run.recipe.train.folds)
        logits = answer_folds(speech, weights, features.folder, clips, fold, seed, partial_folder)
        _write(speech, clips, logits, partial_folder)

    reads = {"recipe": run.recipe, "seed": seed, "speech": speech.key}
    run_stage(folder, reads, make)


def _score_student(run: Run, folder: Path) -> None:
    """Make ``scores.json`` of a variant with [distill], in a process of its own."""
    speech, weights, seed = run.speech, run.weights, run.seed
    (targets,) = run.shared()

    def make(partial_folder: Path) -> None:
        chosen, student = speech.where(speech.split.train), partial_folder / "choice"
        fit_student(speech, weights, targets.folder, chosen, seed, student)
        network = load_classifier(run.recipe, weights, student / "model.safetensors")
        clips, views = _asked(speech), load_views(targets.folder)
        logits = window_logits(network.from_features, views, speech.where(clips), "features")
        _write(speech, clips, logits, partial_folder)

    reads = {"recipe": run.recipe, "seed": seed, "targets": key_of(targets.reads)}
    run_stage(folder, reads, make)


def _write(speech: Speech, clips: Sequence[Clip], logits: Logits, folder: Path) -> None:
    true = np.array([speech.labels.index(clip.emotion) for clip in clips])
    probs = clip_probs(logits, fit_temperature(logits, true))
    scores = score(probs, clips, speech.labels, speech.masks)
    document = {"scores": scores, "probs": probs.round(5).tolist()}
    (folder / "scores.json").write_text(json.dumps(document))
    whole = scores["pooled"]
    said = f"pooled UA {whole['ua']['value']:.3f}, nll {whole['nll']:.3f}"
    tqdm.write(f"{folder.name.removesuffix('.partial')}: {said}")


def _gain(probs: Sequence[Floats], base: Sequence[Floats], speech: Speech) -> dict[str, Any]:
    """Return the difference of pooled UA from the base's, with its interval over speakers."""
    clips = _asked(speech)
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


def table(summary: Mapping[str, Any]) -> str:
    """Return an ablation as a Markdown table."""
    variants = summary["variants"]
    names = [name for name in next(iter(variants.values())) if name != "gain"]
    lines = [
        f"`{summary['command']}`: {summary['clips']} clips of speakers that are not for the test, "
        "each answered by a model that has not heard its speaker. Unweighted accuracy, mean ± "
        "standard deviation over seeds; the gain is that of pooled UA, with its 95 % interval.",
        "",
        f"| variant | {' | '.join(names)} | gain |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for name, row in variants.items():
        cells = [shown(row[column]) for column in names]
        gain = row["gain"]
        cells.append(
            f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else ""
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
