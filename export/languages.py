"""Leave one language out: what a recipe scores on a language that it has not heard.

Each language of the train and validation speakers is answered by a model that was trained on the
others; test speakers are not touched.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.confidence import clip_probs
from export.crossfit import answer_folds
from export.errors import RecipeError
from export.recipe_file import read_recipe
from export.run import features_of
from export.scores import score
from export.seeds import shown, spread
from export.speech import Speech
from export.stage import run_stage


def run_languages(
    path: Path, corpora: Path, weights: Path | None, out: Path, seeds: tuple[int, ...]
) -> None:
    """Score every language: ``<out>/<name>/languages.json`` and ``.md``; resumable.

    Raises:
        RecipeError: The recipe has no [train], or its corpora speak one language.
    """
    recipe = read_recipe(path)
    if not recipe.train or recipe.folds:
        raise RecipeError(f"{path}: needed is a recipe with [train] and without [folds]")
    speech = Speech(recipe, corpora)
    clips = (*speech.split.train, *speech.split.validation)
    languages = sorted({clip.language for clip in clips})
    if len(languages) < 2:
        raise RecipeError(f"{path}: all clips are in {languages[0]!r}; needed are two languages")
    home = out / recipe.name
    features = home / "features"
    reads, make_features = features_of(speech, weights)
    # As `export run` makes them, so that neither command makes them again for the other.
    key = run_stage(features, {"after": None, **reads}, make_features)
    fold = np.array([languages.index(clip.language) for clip in clips])
    found = []
    for seed in seeds:
        folder = home / f"seed{seed}" / "languages"

        def make(partial_folder: Path, seed: int) -> None:
            logits = answer_folds(speech, weights, features, clips, fold, seed, partial_folder)
            scores = {
                language: score(
                    clip_probs([logits[place] for place in np.flatnonzero(fold == number)]),
                    [clips[place] for place in np.flatnonzero(fold == number)],
                    speech.labels,
                    speech.masks,
                )
                for number, language in enumerate(languages)
            }
            (partial_folder / "scores.json").write_text(json.dumps(scores, indent=1))

        reads = {"after": key, "recipe": recipe, "seed": seed}
        run_stage(folder, reads, partial(make, seed=seed))
        found.append(json.loads((folder / "scores.json").read_text()))
        tqdm.write(f"seed {seed}: " + ", ".join(f"{n} {_ua(s):.3f}" for n, s in found[-1].items()))
    summary = {
        "recipe": recipe.name,
        "command": f"python -m export languages {path.name} --seeds {','.join(map(str, seeds))}",
        "languages": {
            language: {
                "clips": sum(row["clips"] for row in found[0][language]["corpora"].values()),
                "masked_ua": spread([_ua(scores[language]) for scores in found]),
                "corpora": {
                    name: spread(
                        [s[language]["corpora"][name]["masked"]["ua"]["value"] for s in found]
                    )
                    for name in found[0][language]["corpora"]
                },
            }
            for language in languages
        },
    }
    (home / "languages.json").write_text(json.dumps(summary, indent=1) + "\n")
    (home / "languages.md").write_text(table(summary))
    print(table(summary))


def _ua(scores: dict[str, Any]) -> float:
    """Return the mean over the corpora of a language of their UA among their own labels."""
    rows = scores["corpora"].values()
    return float(np.mean([row["masked"]["ua"]["value"] for row in rows]))


def table(summary: dict[str, Any]) -> str:
    """Return the languages as a Markdown table."""
    lines = [
        f"`{summary['command']}`: unweighted accuracy among the labels of each corpus, by models "
        "that were trained on the other languages alone; mean ± standard deviation over seeds.",
        "",
        "| language | clips | UA | corpora |",
        "|---|---|---|---|",
    ]
    for language, row in summary["languages"].items():
        corpora = ", ".join(f"{n} {cell['mean']:.3f}" for n, cell in row["corpora"].items())
        ua = shown(row["masked_ua"])
        lines.append(f"| {language} | {row['clips']} | {ua} | {corpora} |")
    return "\n".join(lines) + "\n"
