"""How far confidence can be trusted: calibration error, reliability, risk against coverage."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.metrics import Floats, Ints

BINS = 15
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_LEAST_PROB = 1e-12


@dataclass(frozen=True)
class Bin:
    """The clips whose highest probability lies in one bin.

    Attributes:
        clips: How many.
        confidence: Mean of their highest probabilities.
        accuracy: Share of them that is right.
    """

    clips: int
    confidence: float
    accuracy: float


def _right(probs: Floats, true: Ints) -> npt.NDArray[np.bool_]:
    return np.asarray(probs.argmax(axis=1) == true)


def _places(confidence: Floats, bins: int) -> npt.NDArray[np.int64]:
    """Return the number of each confidence's bin, 0 to bins - 1."""
    edges = np.linspace(0, 1, bins + 1)
    # Float32 probabilities may sum to, and thus reach, a little more than 1.
    return np.minimum(np.searchsorted(edges, confidence, side="left") - 1, bins - 1)


def reliability(probs: Floats, true: Ints, bins: int = BINS) -> list[Bin]:
    """Return the bins of a reliability diagram that have clips, from the lowest confidence on.

    B_m holds the clips whose highest probability lies in ((m - 1) / M, m / M] (Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017).

    Args:
        probs: Shape (N, C), rows sum to 1.
        true: Shape (N,).
        bins: M, equal in width.
    """
    confidence, right = probs.max(axis=1), _right(probs, true)
    place = _places(confidence, bins)
    inside = [np.flatnonzero(place == number) for number in np.unique(place)]
    return [Bin(len(i), float(confidence[i].mean()), float(right[i].mean())) for i in inside]


def expected_calibration_error(probs: Floats, true: Ints, bins: int = BINS) -> float:
    """How far confidence is from accuracy, 0 to 1: sum_m |B_m| / N |acc(B_m) - conf(B_m)|.

    That is eq. 3 of the paper of `reliability`, whose arguments these are.
    """
    found = reliability(probs, true, bins)
    return sum(b.clips * abs(b.accuracy - b.confidence) for b in found) / len(true)


def error_if_calibrated(
    probs: Floats, bins: int = BINS, *, draws: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Return what `expected_calibration_error` shows of a perfectly calibrated model by chance.

    A bin of few clips is never exactly as often right as it is sure, so the error of a few hundred
    clips is well above 0 whatever the model. Here each clip is right with the probability that its
    confidence states (consistency resampling: Broecker and Smith, Weather and Forecasting 22,
    2007).

    Args:
        probs: Shape (N, C), rows sum to 1.
        bins: M, equal in width.
        draws: How often all N clips are drawn.
        seed: Decides the draws.

    Returns:
        ``mean`` of the error over the draws, and ``high``, which 95 % of them do not exceed.
    """
    confidence = probs.max(axis=1)
    place = _places(confidence, bins)
    drawn = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    # A bin's part of the error is |wins - expected wins| / N.
    surplus = (drawn - confidence) @ (place[:, None] == np.arange(bins))
    errors = np.abs(surplus).sum(axis=1) / len(confidence)
    return {"mean": float(errors.mean()), "high": float(np.quantile(errors, 0.95))}


def risk_coverage(probs: Floats, true: Ints) -> dict[str, float]:
    """Return the share of wrong answers among the surest ones, by the share that is answered.

    Args:
        probs: Shape (N, C).
        true: Shape (N,).

    Returns:
        For each of `COVERAGES`, as text with one decimal, the error of the answers that are sure
        enough (El-Yaniv and Wiener, JMLR 11, 2010). Of equal confidences the earlier clip counts
        as the surer one.
    """
    order = np.argsort(-probs.max(axis=1), kind="stable")
    wrong = ~_right(probs, true)[order]
    return {
        f"{share:.1f}": float(wrong[: max(1, math.ceil(share * len(wrong)))].mean())
        for share in COVERAGES
    }


def nll(probs: Floats, true: Ints) -> float:
    """Negative log-likelihood in nats, -1/N sum_i ln p_i(true_i), probabilities from 1e-12 up."""
    chosen = probs[np.arange(len(true)), true]
    return float(-np.log(np.maximum(chosen, _LEAST_PROB)).mean())
