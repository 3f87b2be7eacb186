"""Out-of-fold scores: every clip is answered by a model that has not heard its speaker."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from edge_ser.bundle import ADAPTATION
from export.baselines import linear_probe, state_statistics
from export.confidence import clip_probs
from export.corpora import Clip
from export.crossfit import answer_folds, make_adaptation
from export.metrics import Floats
from export.model import lift, new_classifier
from export.scores import brief, score
from export.speech import Speech
from export.splits import folds, out_of_fold
from export.views import load_views


def make_folds(
    speech: Speech,
    weights: Path | None,
    features: Path,
    seed: int,
    folder: Path,
) -> None:
    """The stage: ``folds.json`` with the scores of the head and of a linear probe, same folds.

    Args:
        speech: The clips; all of them are held out once.
        weights: Folder of pretrained checkpoints.
        features: The folder of the encoder's views.
        seed: Of the training.
        folder: Takes the file, and a folder a fold.
    """
    settings = speech.recipe.folds
    assert settings  # only recipes with [folds] have this stage
    clips = speech.clips
    fold = folds(clips, settings.k, settings.seed)
    logits = answer_folds(speech, weights, features, clips, fold, seed, folder)
    pretrained = lift(speech.recipe, new_classifier(speech.recipe, weights))
    statistics = state_statistics(load_views(features), clips, pretrained)

    def by_probe(train: tuple[Clip, ...], held_out: tuple[Clip, ...]) -> Floats:
        return linear_probe(statistics, speech.labels, train, held_out).scores

    answers = {
        "linear_probe": out_of_fold(clips, settings.k, settings.seed, by_probe),
        "head": clip_probs(logits),
    }
    found = {}
    for name, of_clips in answers.items():
        are_probs = name == "head"
        found[name] = score(of_clips, clips, speech.labels, speech.masks, are_probs=are_probs)
        tqdm.write(f"{name}: {brief(found[name])}")
    means = np.array([one.mean(axis=0) for one in logits], np.float64)
    rows = make_adaptation(speech, clips, means, fold, folder / ADAPTATION)
    document = {
        "seed": seed,
        "folds": asdict(settings),
        "systems": found,
        "adaptation": rows,
    }
    (folder / "folds.json").write_text(json.dumps(document, indent=1))
