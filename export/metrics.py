"""What a model's answers are worth: scores, calibration, and how sure a difference is.

Classes are integers from 0, `true` and `predicted` integer arrays of shape (N,). Scores come from
confusion matrices of shape (..., n, n), rows true and columns predicted, so that one call scores a
thousand resamples. A class that does not occur has no recall: its own score is nan, and every mean
leaves it out.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import rel_entr

FEWEST_SPEAKERS = 5
"""With fewer speakers in a corpus, resampling them says more of the draw than of the model."""


Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.number]


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval.

    Attributes:
        value: The score of all clips.
        low: 2.5th percentile of the resamples.
        high: 97.5th percentile.
        unit: What was resampled: "speaker", "clip", or "speaker and clip" where corpora differ.
    """

    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class McNemar:
    """Two systems on the same clips.

    Attributes:
        first_only: Clips that only the first system has right.
        second_only: Clips that only the second system has right.
        p_value: Chance of a split at least as uneven if both were equally good, two-sided.
    """

    first_only: int
    second_only: int
    p_value: float


def confusion(true: Ints, predicted: Ints, n: int) -> npt.NDArray[np.int64]:
    """Count clips by true class (row) and predicted class (column): shape (n, n).

    Raises:
        ValueError: Arrays of different length, or a class that is not 0 to n - 1.
    """
    return _confusions(true, predicted, n, np.zeros(len(true), np.int64), 1)[0]


def _confusions(
    true: Ints, predicted: Ints, n: int, units: Ints, count: int
) -> npt.NDArray[np.int64]:
    """Count as `confusion` does, for every unit apart: shape (count, n, n)."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape:
        raise ValueError(f"shapes {true.shape} and {predicted.shape}, needed are (N,) and (N,)")
    both = np.concatenate([true, predicted])
    if both.size and not (both.min() >= 0 and both.max() < n):
        raise ValueError(f"classes {both.min()} to {both.max()}, allowed are 0 to {n - 1}")
    cells = np.bincount((units * n + true) * n + predicted, minlength=count * n * n)
    return cells.reshape(count, n, n)


def recalls(matrix: Matrix) -> Floats:
    """Recall of every class, TP / (TP + FN): shape (..., n), nan where a class does not occur."""
    occurring = matrix.sum(axis=-1)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _ratio(hits, occurring)


def _ratio(part: Matrix, whole: Matrix) -> Floats:
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, out=np.full(shape, np.nan), where=np.asarray(whole) > 0)


def _mean_where(values: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    return _ratio(np.where(mask, values, 0.0).sum(axis=-1), mask.sum(axis=-1))


def ua(matrix: Matrix) -> Floats:
    """Unweighted accuracy: mean recall of the classes that occur, shape (...), 0 to 1.

    UA = 1/K sum_k TP_k / N_k (Schuller et al., Interspeech 2009 Emotion Challenge: "UA recall").
    """
    return _mean_where(recalls(matrix), matrix.sum(axis=-1) > 0)


def wa(matrix: Matrix) -> Floats:
    """Weighted accuracy, which is accuracy: sum_k TP_k / N, shape (...), 0 to 1."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).sum(axis=-1)
    return _ratio(hits, matrix.sum(axis=(-2, -1)))


def ua_plus_wa(matrix: Matrix) -> Floats:
    """UA + WA, 0 to 2, as some papers rank systems."""
    return ua(matrix) + wa(matrix)


def f1(matrix: Matrix) -> Floats:
    """F1 of every class, 2 TP / (2 TP + FP + FN): shape (..., n).

    nan where a class neither occurs nor is predicted; 0 where it is predicted only.
    """
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _ratio(2 * hits, matrix.sum(axis=-1) + matrix.sum(axis=-2))


def macro_f1(matrix: Matrix) -> Floats:
    """Mean F1 of the classes that occur, shape (...), 0 to 1."""
    return _mean_where(f1(matrix), matrix.sum(axis=-1) > 0)


def masked_argmax(probs: Floats, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the most probable class among the allowed ones.

    Args:
        probs: Shape (N, C).
        mask: bool, shape (C,) or (N, C); what a corpus has among the labels.

    Returns:
        Shape (N,), classes whose mask is set.

    Raises:
        ValueError: A clip without an allowed class.
    """
    if not np.any(mask, axis=-1).all():
        raise ValueError("a mask without a class, needed is one at least")
    return np.where(mask, probs, -np.inf).argmax(axis=-1)


def ua_interval(
    true: Ints,
    predicted: Ints,
    n: int,
    speakers: npt.ArrayLike,
    corpora: npt.ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return UA with its percentile bootstrap interval (Efron and Tibshirani, 1993, chapter 13).

    Clips of one speaker resemble each other, so whole speakers are drawn with replacement where a
    corpus has five or more, and single clips where it has fewer. Each corpus keeps its number of
    draws. A class that a resample misses is left out of that resample's mean.

    Args:
        true: Shape (N,).
        predicted: Shape (N,).
        n: Number of classes.
        speakers: Name of each clip's speaker, shape (N,).
        corpora: Name of each clip's corpus, shape (N,).
        resamples: Number of resamples.
        seed: Of the draws.

    Returns:
        UA, its interval, and what was drawn.
    """
    units, weights, unit = _draws(speakers, corpora, resamples, seed)
    matrices = _confusions(true, predicted, n, units, weights.shape[1])
    return _interval(ua(matrices.sum(axis=0)), ua(_weighted(weights, matrices)), unit)


def divergence(exact: Floats, found: Floats) -> float:
    """Return the mean Kullback-Leibler divergence of probs from exact ones, both (N, C), in nats.

    Probabilities of ``found`` count as 1e-12 at least.
    """
    return float(rel_entr(exact, np.maximum(found, 1e-12)).sum(axis=1).mean())


def ua_difference(
    true: Ints,
    first: Ints,
    second: Ints,
    n: int,
    speakers: npt.ArrayLike,
    corpora: npt.ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return UA(first) - UA(second) with its interval; both are scored on the same resamples.

    Args:
        true: Shape (N,).
        first: Predictions of one system, shape (N,).
        second: Predictions of the other, shape (N,).
        n: Number of classes.
        speakers: As for `ua_interval`.
        corpora: As for `ua_interval`.
        resamples: Number of resamples.
        seed: Of the draws.

    Returns:
        The difference, its interval, and what was drawn.
    """
    units, weights, unit = _draws(speakers, corpora, resamples, seed)
    one = _confusions(true, first, n, units, weights.shape[1])
    two = _confusions(true, second, n, units, weights.shape[1])
    value = ua(one.sum(axis=0)) - ua(two.sum(axis=0))
    return _interval(value, ua(_weighted(weights, one)) - ua(_weighted(weights, two)), unit)


def _draws(
    speakers: npt.ArrayLike, corpora: npt.ArrayLike, resamples: int, seed: int
) -> tuple[npt.NDArray[np.int64], Floats, str]:
    """Return each clip's unit (N,), how often each unit is drawn (resamples, U), and its name."""
    speakers, corpora = np.asarray(speakers), np.asarray(corpora)
    rng = np.random.default_rng(seed)
    units = np.zeros(len(speakers), np.int64)
    names, weights, count = set(), [], 0
    for corpus in np.unique(corpora):
        inside = np.flatnonzero(corpora == corpus)
        found, index = np.unique(speakers[inside], return_inverse=True)
        by_speaker = len(found) >= FEWEST_SPEAKERS
        size = len(found) if by_speaker else len(inside)
        units[inside] = count + (index if by_speaker else np.arange(size))
        names.add("speaker" if by_speaker else "clip")
        weights.append(rng.multinomial(size, np.full(size, 1 / size), resamples))
        count += size
    return (
        units,
        np.concatenate(weights, axis=1).astype(np.float64),
        " and ".join(sorted(names, reverse=True)),
    )


def _weighted(weights: Floats, matrices: npt.NDArray[np.int64]) -> Floats:
    count, n, _ = matrices.shape
    return (weights @ matrices.reshape(count, n * n)).reshape(-1, n, n)


def _interval(value: Floats, resampled: Floats, unit: str) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(value), float(low), float(high), unit)


def mcnemar(true: Ints, first: Ints, second: Ints) -> McNemar:
    """Compare two systems clip by clip by the exact test of McNemar (Psychometrika 12, 1947).

    Of the clips that one system alone has right, half should be the first's: two-sided binomial
    test. Clips count as independent, which those of one speaker are not: read it next to
    `ua_difference`.
    """
    first_right, second_right = first == true, second == true
    first_only = int(np.sum(first_right & ~second_right))
    second_only = int(np.sum(second_right & ~first_right))
    decided = first_only + second_only
    p_value = stats.binomtest(first_only, decided).pvalue if decided else 1.0
    return McNemar(first_only, second_only, float(p_value))
