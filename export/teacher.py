"""What a student hears of a window, and what its teachers say of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from export.encoders import encode_states, load_encoder
from export.heads import normalised
from export.model import lift, load_classifier
from export.recipe import EncoderChoice, Recipe
from export.speech import Speech
from export.targets import mean_answer
from export.views import Arrays, Compute, Samples, View

TEACHERS = {"choice": "fold0", "refit": "whole"}
"""Which of the teacher's trained networks each student learns from: the first student is judged on
the validation speakers, so its teacher has not heard them either."""


def parts(recipe: Recipe) -> list[str]:
    """Return the trained networks of a teacher's recipe, by the names of their folders."""
    assert recipe.train  # teachers are trained, not distilled
    return ["whole", *(f"fold{number}" for number in range(recipe.train.folds))]


def load_teacher(
    recipe: Recipe,
    weights: Path | None,
    trained: Sequence[Path],
    student: EncoderChoice,
    layers: bool = False,
) -> Compute:
    """Return what computes the student's features of a window, and its teachers' answers.

    Args:
        recipe: The teachers'.
        weights: Folder of pretrained checkpoints.
        trained: The folders of the teachers' training stages, one a seed: their log-probs are
            averaged, all else is that of the first member of the first one.
        student: The student's encoder.
        layers: Keep the hidden states of the teachers' layers as well.
    """
    teachers = {
        part: [
            load_classifier(recipe, weights, folder / part / "model.safetensors")
            for folder in trained
        ]
        for part in parts(recipe)
    }
    # Below what is tuned, all of them are the pretrained encoder.
    assert recipe.train  # teachers are trained, not distilled
    below = encode_states(recipe.encoder, weights, recipe.windows.window_s, recipe.train.tuned)
    hears = load_encoder(student, weights, recipe.windows.window_s)

    @torch.no_grad()
    def answer(samples: Samples) -> Arrays:
        window = torch.from_numpy(samples)[None]
        # (mels, F at 100 Hz), or samples (1, T)
        arrays: Arrays = {"features": hears.features(window)[0].numpy().astype(np.float16)}
        cached = torch.from_numpy(below(samples)["states"])[None].float()
        for part, networks in teachers.items():
            answers = [one.head(lift(recipe, one)(cached))[0] for one in networks]
            arrays[f"{part}_logits"] = mean_answer(answers)[0].numpy()
        for part in TEACHERS.values():
            first = teachers[part][0]
            states, member = normalised(lift(recipe, first)(cached)), first.head.members[0]
            arrays[f"{part}_frames"] = member.frames(states)[0].numpy().astype(np.float16)  # (D, F)
            arrays[f"{part}_embedding"] = member(states)[1][0].numpy()
            if layers:
                arrays[f"{part}_layers"] = states[0].numpy().astype(np.float16)  # (S, F, D)
        return arrays

    return answer


def left_out(speech: Speech, views: Sequence[View]) -> dict[int, int]:
    """Return the fold that each clip of train and validation was dealt into for the teacher.

    Args:
        speech: The student's; its split is the teacher's.
        views: As `load_teacher` computes them.
    """
    answering = sum(name.endswith("_logits") for name in views[0].arrays)
    clips = speech.where((*speech.split.train, *speech.split.validation))
    # One part has heard everybody; each of the others has left a fold out.
    return dict(zip(clips, speech.split.deal(answering - 1).tolist(), strict=True))


def taught_by(name: str, views: Sequence[View], fold: Mapping[int, int]) -> list[View]:
    """Return views with the answers to one of `TEACHERS`: features, frames, logits, embedding.

    Args:
        name: The student.
        views: As `load_teacher` computes them.
        fold: The clips whose logits are those of the network that left this fold out.
    """
    part = TEACHERS[name]
    taught = []
    for view in views:
        own = f"fold{fold[view.clip]}" if view.clip in fold else part
        arrays = {
            key.removeprefix(f"{part}_"): array
            for key, array in view.arrays.items()
            if key == "features" or key.startswith(f"{part}_")
        }
        logits = view.arrays[f"{own}_logits"]
        taught.append(View(view.clip, view.number, {**arrays, "logits": logits}))
    return taught
