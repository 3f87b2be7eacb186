"""What a recipe hears: its clips, who is on which side, and how views are cut from them."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from export import splits
from export.corpora import Clip, label_mask, load_corpora, select
from export.recipe import Recipe
from export.stage import fingerprint
from export.views import Cutting, Samples, view_windows

RATE_HZ = 16000  # of every encoder that there is


class Speech:
    """The clips of a recipe.

    Args:
        recipe: Says which corpora, labels and speakers.
        corpora: The folder of the corpora.

    Attributes:
        recipe: As given.
        labels: The labels of the model.
        cutting: How views are cut from a clip.
    """

    def __init__(self, recipe: Recipe, corpora: Path) -> None:
        self.recipe, self.labels = recipe, recipe.data.labels
        self.cutting = Cutting(RATE_HZ, recipe.windows, recipe.augmentation)
        self._corpora = corpora

    @cached_property
    def clips(self) -> tuple[Clip, ...]:
        """All clips that carry a label of the model, in the order of the recipe's corpora."""
        data = self.recipe.data
        selection = select(load_corpora(self._corpora, data.corpora), data.labels, data.merge)
        for (corpus, emotion), count in selection.dropped.items():
            tqdm.write(f"{corpus}: {count} clips of {emotion!r} left out, which is no label")
        return selection.clips

    @cached_property
    def unlabelled(self) -> tuple[Clip, ...]:
        """All clips that a student hears without their labels, none of a test speaker."""
        distill = self.recipe.distill
        if not (distill and distill.unlabelled):
            return ()
        clips = load_corpora(self._corpora, distill.unlabelled)
        return tuple(clip for clip in clips if clip.speaker_key not in splits.TEST_SPEAKERS)

    @cached_property
    def split(self) -> splits.Split:
        """Train, validation, calibration and test clips."""
        data = self.recipe.data
        return splits.split(self.clips, data.validation, calibration_clips=data.calibration_clips)

    @cached_property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The labels that each corpus has, bool of shape (C,)."""
        return label_mask(self.clips, self.labels)

    @cached_property
    def key(self) -> str:
        """The fingerprint of all audio and of what is said about it."""
        clips = (*self.clips, *self.unlabelled)
        said = [[c.corpus, c.emotion, c.speaker_key, c.path.name] for c in clips]
        return fingerprint(clip.path for clip in clips) + json.dumps(said)

    def where(self, clips: Sequence[Clip]) -> list[int]:
        """Return the places of clips among all, those without labels behind the others."""
        places = {clip: place for place, clip in enumerate((*self.clips, *self.unlabelled))}
        return [places[clip] for clip in clips]

    def sounds(self, count: int) -> range:
        """Return the places of so many sounds that are no speech, behind all clips."""
        first = len(self.clips) + len(self.unlabelled)
        return range(first, first + count)

    def views(self, most: int) -> list[int]:
        """Return the number of augmented views of each clip: none of a test speaker's."""
        test = set() if self.recipe.folds else set(self.split.test)
        return [0 if clip in test else most for clip in (*self.clips, *self.unlabelled)]

    def first_windows(self, clips: Sequence[Clip]) -> list[Samples]:
        """Return the first window of each clip, float32 (T,)."""
        return [next(view_windows(clip, 0, self.cutting)) for clip in clips]
