"""What a student hears of a window, and what its teachers say of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from export.encoders import encode_states, load_encoder
from export.heads import normalised
from export.model import lift, load_classifier
from export.recipe import EncoderChoice, Recipe
from export.targets import mean_answer
from export.views import Arrays, Compute, Samples, View

TEACHERS = {"choice": "fold0", "refit": "whole"}
"""Which of the teacher's trained networks each student learns from: the first student is judged on
the validation speakers, so its teacher has not heard them either.

What a teacher remembers of speakers comes through its answers to others: ridge regression that was
taught by networks which had heard the speakers it was asked about, on clips of others alone, had a
pooled UA of .85 there, taught by labels .71 (recipe ``default``, four folds)."""


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
        name: [
            load_classifier(recipe, weights, folder / part / "model.safetensors")
            for folder in trained
        ]
        for name, part in TEACHERS.items()
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
        for name, (first, *others) in teachers.items():
            states = lift(recipe, first)(cached)
            logits, embeddings = first.head(states)
            answers = [logits, *(o.head(lift(recipe, o)(cached))[0] for o in others)]
            embedding = embeddings.chunk(len(first.head.members), dim=1)[0]
            normed = normalised(states)
            frames = first.head.members[0].frames(normed)
            arrays[f"{name}_frames"] = frames[0].numpy().astype(np.float16)  # (D, F at 25 Hz)
            arrays[f"{name}_logits"] = mean_answer(answers)[0].numpy()
            arrays[f"{name}_embedding"] = embedding[0].numpy()
            if layers:
                arrays[f"{name}_layers"] = normed[0].numpy().astype(np.float16)  # (S, F, D)
        return arrays

    return answer


def taught_by(name: str, views: Sequence[View]) -> list[View]:
    """Return views with the answers of one of `TEACHERS`: features, frames, logits, embedding."""
    return [
        View(
            view.clip,
            view.number,
            {key.removeprefix(f"{name}_"): array for key, array in view.arrays.items()},
        )
        for view in views
    ]
