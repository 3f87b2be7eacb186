"""Out-of-fold scores: every clip is answered by a model that has not heard its speaker."""

import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from export.baselines import linear_probe, state_statistics
from export.confidence import clip_probs
from export.corpora import Clip
from export.metrics import Floats
from export.scores import brief, score
from export.speech import Speech
from export.splits import out_of_fold
from export.train import fit_head, window_logits
from export.views import load_views


def make_folds(speech: Speech, features: Path, seed: int, folder: Path) -> None:
    """The stage: ``folds.json`` with the scores of the head and of a linear probe, same folds.

    Args:
        speech: The clips; all of them are held out once.
        features: The folder of the encoder's views.
        seed: Of the training.
        folder: Takes the file, and a folder of checkpoints a fold.
    """
    settings = speech.recipe.folds
    assert settings  # only recipes with [folds] have this stage
    views = load_views(features)
    statistics = state_statistics(views, speech.clips)

    def by_head(train: tuple[Clip, ...], held_out: tuple[Clip, ...]) -> Floats:
        part = folder / f"without-{held_out[0].speaker_key.replace('/', '-')}"
        head = fit_head(speech, views, speech.where(train), seed, part)
        return clip_probs(window_logits(head, views, speech.where(held_out)))

    def by_probe(train: tuple[Clip, ...], held_out: tuple[Clip, ...]) -> Floats:
        return linear_probe(statistics, speech.labels, train, held_out).scores

    found = {}
    for name, answer in (("linear_probe", by_probe), ("head", by_head)):
        answers = out_of_fold(speech.clips, settings.k, settings.seed, answer)
        found[name] = score(
            answers, speech.clips, speech.labels, speech.masks, are_probs=name == "head"
        )
        tqdm.write(f"{name}: {brief(found[name])}")
    document = {"seed": seed, "folds": asdict(settings), "systems": found}
    (folder / "folds.json").write_text(json.dumps(document, indent=1))
