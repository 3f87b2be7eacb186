"""Heads that have not heard some of the speakers, and what only their answers can tell.

One head hears all speakers but those of the test; it is shipped. Beside it, each of the others
leaves some speakers out and answers for these alone. From such answers come the temperature, the
threshold below which an answer is called uncertain, and the adaptation to a speaker.
"""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edge_ser.bundle import ADAPTATION
from export.adapt import fit_adaptation, measure
from export.confidence import write_confidence
from export.corpora import Clip
from export.metrics import Floats, Ints
from export.speech import Speech
from export.splits import pooled
from export.targets import Targets
from export.train import fit_head, fit_member, window_logits
from export.views import View, load_views
from export.workers import workers

Logits = list[npt.NDArray[np.float32]]


def train_member(
    speech: Speech,
    weights: Path | None,
    features: Path,
    chosen: Sequence[int],
    seed: int,
    folder: Path,
    number: int,
) -> None:
    """Train one member of a head on some clips, which leaves it in the folder for `fit_fold`."""
    fit_member(speech, weights, _views_of(features), chosen, seed, folder, number)


def fit_fold(
    speech: Speech,
    weights: Path | None,
    features: Path,
    chosen: Sequence[int],
    asked: Sequence[int],
    seed: int,
    folder: Path,
) -> Logits:
    """Finish a head of some clips and return the logits (W, C) of others."""
    views = _views_of(features)
    head = fit_head(speech, weights, views, chosen, seed, folder)
    return window_logits(head, views, asked)


@cache
def _views_of(features: Path) -> list[View]:
    # They take gigabytes: a process loads them once, for all the heads that it trains.
    return load_views(features)


def answer_folds(
    speech: Speech,
    weights: Path | None,
    features: Path,
    clips: Sequence[Clip],
    fold: Ints,
    seed: int,
    folder: Path,
    *,
    whole: bool = False,
) -> Logits:
    """Answer every clip by a head that was trained on the other folds, all cores training at once.

    Args:
        speech: Settings.
        weights: Folder of pretrained checkpoints.
        features: The folder of the encoder's views.
        clips: N clips.
        fold: Of every clip, (N,).
        seed: Of the trainings.
        folder: Takes a folder a head, ``fold0``, ``fold1``, ...
        whole: Train one head on all clips as well, in ``whole``.

    Returns:
        The logits (W, C) of each clip's windows, in the order of the clips.
    """
    places = np.array(speech.where(clips))
    numbers = np.unique(fold).tolist()
    jobs = [(f"fold{n}", places[fold != n].tolist(), places[fold == n].tolist()) for n in numbers]
    if whole:
        jobs.append(("whole", places.tolist(), []))
    heard = (speech, weights, features)
    with workers() as pool:
        # Members first, each a job of its own: else the last head keeps one core busy for long.
        members = [
            pool.submit(train_member, *heard, chosen, seed, folder / name, member)
            for name, chosen, _ in jobs
            for member in range(speech.recipe.head.members)
        ]
        for trained in members:
            trained.result()
        parts = [
            pool.submit(fit_fold, *heard, chosen, asked, seed, folder / name)
            for name, chosen, asked in jobs
        ]
        answers = [logits for part in parts for logits in part.result()]
    order = np.concatenate([np.flatnonzero(fold == n) for n in numbers])
    return [answers[place] for place in np.argsort(order)]


def make_heads(
    speech: Speech,
    weights: Path | None,
    features: Path,
    seed: int,
    folder: Path,
) -> None:
    """The stage: ``model.safetensors``, ``confidence.json``, ``adaptation.json`` and its scores.

    Args:
        speech: Clips, split and settings.
        weights: Folder of pretrained checkpoints.
        features: The folder of the encoder's views.
        seed: Of the trainings.
        folder: Takes the files, and a folder a head.
    """
    assert speech.recipe.train  # only recipes with [train] have this stage
    clips = (*speech.split.train, *speech.split.validation)
    fold = speech.split.deal(speech.recipe.train.folds)
    logits = answer_folds(speech, weights, features, clips, fold, seed, folder, whole=True)
    shutil.copyfile(folder / "whole" / "model.safetensors", folder / "model.safetensors")
    temperature = write_confidence(speech, clips, logits, folder)
    calibrated = np.array([one.mean(axis=0) / temperature for one in logits], np.float64)
    rows = make_adaptation(speech, clips, calibrated, fold, folder / ADAPTATION)
    (folder / "adaptation_scores.json").write_text(json.dumps(rows, indent=1) + "\n")


def make_adaptation(
    speech: Speech, clips: Sequence[Clip], logits: Floats, fold: Ints, file: Path
) -> list[dict[str, Any]]:
    """Write the adaptation of a bundle, and measure what it is worth for speakers it has not heard.

    Args:
        speech: Labels and settings.
        clips: N clips.
        logits: Calibrated, each by a head that has not heard the speaker, (N, C).
        fold: Of every clip, (N,); the speakers of a fold are answered by the network of the others.
        file: Takes the network of all folds.

    Returns:
        The rows of `export.adapt.measure`.
    """
    targets = Targets.of(speech)
    places = speech.where(clips)
    settings = speech.recipe.train
    assert settings  # only recipes with [train] have this stage
    labels, mask = targets.label[places].numpy(), targets.mask[places].numpy()
    weights = targets.weights(places, settings.balance)[places].double().numpy()

    def fit(chosen: npt.NDArray[np.bool_]) -> Any:
        where = np.flatnonzero(chosen)
        among = [clips[place] for place in where]
        return fit_adaptation(logits[where], among, labels[where], mask[where], weights[where])

    file.write_text(json.dumps(fit(np.ones(len(clips), bool)).to_json()) + "\n")
    networks = {number: fit(fold != number) for number in np.unique(fold).tolist()}
    kept = set(pooled(clips))
    where = np.array([place for place, clip in enumerate(clips) if clip in kept])
    rows = measure(
        logits[where],
        [networks[number] for number in fold[where].tolist()],
        [clips[place] for place in where],
        labels[where],
        mask[where],
        len(speech.labels),
    )
    best = next(row for row in rows if row["history"] == "balanced" and row["utterances"] == 20)
    tqdm.write(
        f"adaptation: pooled UA {rows[0]['pooled_ua']:.3f}, after 20 utterances "
        f"{best['pooled_ua']:.3f}"
    )
    return rows
