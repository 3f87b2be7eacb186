"""Who is heard where: speaker-disjoint train, validation and test clips, and folds.

A speaker is meant by its key "family/speaker"; corpora of one family (EmoDB whole and cut to two
seconds) share their speakers and therefore always lie on one side.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.corpora import Clip
from export.errors import CorpusError

TEST_SPEAKERS = (
    "ravdess/16",
    "ravdess/17",
    "ravdess/18",
    "ravdess/19",
    "emodb/11",
    "emodb/16",
    "nemo/IC0",
    "nemo/WR0",
    "turev/1358",
    "turev/6783",
)
"""The speakers that every published number of this project is measured on, and nothing else is."""


@dataclass(frozen=True)
class Split:
    """Clips by purpose.

    Attributes:
        train: For the weights.
        validation: For every choice.
        calibration: For the ranges of quantization; a part of train or validation.
        test: Scored once, by the certificate.

    Raises:
        CorpusError: A speaker on two sides of train, validation and test, or a calibration clip
            that is neither in train nor in validation.
    """

    train: tuple[Clip, ...]
    validation: tuple[Clip, ...]
    calibration: tuple[Clip, ...]
    test: tuple[Clip, ...]

    def __post_init__(self) -> None:
        sides = {name: speakers(getattr(self, name)) for name in ("train", "validation", "test")}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = sorted(sides[one] & sides[other])
            if shared:
                raise CorpusError(f"speaker {shared[0]!r} is in {one} and in {other}, choose one")
        foreign = set(self.calibration) - set(self.train) - set(self.validation)
        if foreign:
            names = sorted(speakers(foreign))
            raise CorpusError(
                f"calibration clips of {names}, allowed are clips of train and validation only"
            )

    def deal(self, count: int) -> npt.NDArray[np.int64]:
        """Return the fold of every clip of train, then of validation: 0 to ``count - 1``.

        Fold 0 holds the validation speakers, so that a network that leaves it out is trained on
        train alone; the other speakers are dealt into the others.
        """
        others = count - 1
        train = folds(self.train, others, 0) + 1 if others > 1 else np.ones(len(self.train), int)
        return np.concatenate([train, np.zeros(len(self.validation), np.int64)])


def speakers(clips: Collection[Clip]) -> frozenset[str]:
    """Return the keys of the speakers of `clips`."""
    return frozenset(clip.speaker_key for clip in clips)


def split(
    clips: Sequence[Clip],
    validation: Collection[str],
    calibration: Collection[str] | None = None,
    test: Collection[str] = TEST_SPEAKERS,
    *,
    calibration_clips: int = 256,
    seed: int = 0,
) -> Split:
    """Divide clips by speaker.

    Args:
        clips: Selected clips; their emotions are the labels of the model.
        validation: Keys of the validation speakers.
        calibration: Keys of the speakers that calibration clips are drawn from, all of train or
            validation; None draws from the train speakers.
        test: Keys of the test speakers. Those of TEST_SPEAKERS whose family has no clip here are
            left out.
        calibration_clips: Calibration clips to draw, evenly over corpora and labels.
        seed: Of the draw.

    Returns:
        All clips of each speaker, those of no named speaker in train.

    Raises:
        CorpusError: A speaker without a clip or on two sides, a label without a train clip, or
            fewer clips than calibration asks for.
    """
    there = speakers(clips)
    families = {clip.family for clip in clips}
    # Only the fixed speakers may be absent: a misspelt one of a recipe would end up in train.
    test = {key for key in test if key not in TEST_SPEAKERS or key.split("/")[0] in families}
    _check_known({*validation, *(calibration or ()), *test}, there)
    heard = sorted(test & set(calibration or ()))
    if heard:
        raise CorpusError(f"speaker {heard[0]!r} is in calibration and in test, choose one")
    train_clips = tuple(clip for clip in clips if clip.speaker_key not in test | set(validation))
    _check_labels(clips, train_clips, "train")
    chosen = speakers(train_clips) if calibration is None else set(calibration)
    return Split(
        train=train_clips,
        validation=tuple(clip for clip in clips if clip.speaker_key in set(validation)),
        calibration=draw(
            [clip for clip in clips if clip.speaker_key in chosen], calibration_clips, seed
        ),
        test=tuple(clip for clip in clips if clip.speaker_key in test),
    )


def _check_known(keys: Collection[str], there: Collection[str]) -> None:
    unknown = sorted(set(keys) - set(there))
    if unknown:
        raise CorpusError(f"no clip of speaker {unknown[0]!r}, there are {sorted(there)}")


def _check_labels(clips: Sequence[Clip], train: Sequence[Clip], name: str) -> None:
    absent = sorted({clip.emotion for clip in clips} - {clip.emotion for clip in train})
    if absent:
        raise CorpusError(f"no clip of {absent[0]!r} in {name}, move a speaker who has one there")


def draw(clips: Sequence[Clip], count: int, seed: int) -> tuple[Clip, ...]:
    """Draw `count` clips without replacement, as evenly over (corpus, emotion) as they allow.

    Every stratum gives one clip before any gives a second, and so on, so that a large corpus does
    not outweigh a small one.

    Raises:
        CorpusError: Fewer than `count` clips.
    """
    if count > len(clips):
        raise CorpusError(f"{count} clips asked for, there are {len(clips)}; ask for fewer")
    taken = Counter[tuple[str, str]]()
    rounds: list[tuple[int, int]] = []
    shuffled = np.random.default_rng(seed).permutation(len(clips))
    for index in shuffled:
        stratum = (clips[index].corpus, clips[index].emotion)
        rounds.append((taken[stratum], int(index)))
        taken[stratum] += 1
    # The sort is stable: within a round, the shuffled order decides.
    rounds.sort(key=lambda pair: pair[0])
    return tuple(clips[index] for _, index in rounds[:count])


def pooled(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Return the clips without corpus `emodb`, whose recordings `emodb_2s` holds as well.

    A pooled score would count them twice; `emodb_2s` stays because it has all seven emotions.
    """
    return tuple(clip for clip in clips if clip.corpus != "emodb")


def folds(clips: Sequence[Clip], k: int, seed: int) -> npt.NDArray[np.int64]:
    """Give every clip one of k folds so that a speaker is in one fold only.

    Speakers, shuffled within family and gender, are dealt like cards over all families in turn.
    So the numbers of speakers in two folds differ by one at most, in all as in every family and in
    every gender of a family.

    Args:
        clips: N clips.
        k: 2 to the number of speakers.
        seed: Of the shuffle.

    Returns:
        The fold of each clip, shape (N,), 0 to k - 1.

    Raises:
        CorpusError: k is out of range.
    """
    groups = {clip.speaker_key: (clip.family, clip.gender) for clip in clips}
    if not 2 <= k <= len(groups):
        raise CorpusError(f"{k} folds, allowed are 2 to {len(groups)}, the number of speakers")
    shuffled = np.random.default_rng(seed).permutation(sorted(groups))
    dealt = sorted(shuffled.tolist(), key=lambda key: groups[key])
    fold = {key: position % k for position, key in enumerate(dealt)}
    return np.array([fold[clip.speaker_key] for clip in clips])


def out_of_fold(
    clips: Sequence[Clip],
    k: int,
    seed: int,
    fit_predict: Callable[[tuple[Clip, ...], tuple[Clip, ...]], npt.ArrayLike],
) -> npt.NDArray[np.float64]:
    """Predict every clip by a model that has not heard its speaker.

    Args:
        clips: N clips.
        k: Number of folds.
        seed: Of the folds.
        fit_predict: Called with the clips to train on and the M clips held out, k times; returns
            probs of shape (M, C) in the order of the latter.

    Returns:
        probs of shape (N, C), aligned with `clips`.

    Raises:
        CorpusError: k is out of range, a label is missing from the train clips of a fold, or
            `fit_predict` does not answer every clip once with finite numbers.
    """
    fold = folds(clips, k, seed)
    places, answers = [], []
    for number in range(k):
        train = tuple(clip for clip, where in zip(clips, fold, strict=True) if where != number)
        held_out = tuple(clip for clip, where in zip(clips, fold, strict=True) if where == number)
        _check_labels(clips, train, f"the train clips of fold {number}")
        probs = np.asarray(fit_predict(train, held_out), np.float64)
        if probs.ndim != 2 or len(probs) != len(held_out) or not np.isfinite(probs).all():
            raise CorpusError(
                f"fold {number}: probs of shape {probs.shape}, "
                f"allowed are {len(held_out)} rows of finite numbers, one a clip"
            )
        places.append(np.flatnonzero(fold == number))
        answers.append(probs)
    # The folds part the clips, so the places are each of 0 to N - 1 once.
    return np.concatenate(answers)[np.argsort(np.concatenate(places))]
