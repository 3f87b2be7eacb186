"""One system on one set of clips: the row that certificates and tables hold."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from export import calibration, metrics
from export.corpora import Clip
from export.splits import pooled

FOUR = ("emodb_2s", "ravdess", "nemo", "turev")
"""The corpora with test speakers, EmoDB by the folder that has all seven labels."""


def score(
    answers: npt.NDArray[np.float64],
    clips: Sequence[Clip],
    labels: Sequence[str],
    masks: Mapping[str, npt.NDArray[np.bool_]],
    *,
    are_probs: bool = True,
) -> dict[str, Any]:
    """Score the answers of one system.

    Args:
        answers: Probs, or scores of any scale, shape (N, C).
        clips: N clips whose emotions are among the labels.
        labels: The C labels.
        masks: For every corpus the labels that it has, bool of shape (C,).
        are_probs: Whether calibration can be scored.

    Returns:
        ``pooled``: all clips (with ``emodb_2s`` for EmoDB), answered among all labels.
        ``corpora``: each corpus, answered among its own labels (``masked``) and among all.
        ``masked_ua_mean``: mean of the masked UA over `FOUR`, as far as they are there.
    """
    true = np.array([labels.index(clip.emotion) for clip in clips])
    corpora = np.array([clip.corpus for clip in clips])
    speakers = np.array([clip.speaker_key for clip in clips])
    masked = metrics.masked_argmax(answers, np.stack([masks[name] for name in corpora]))
    free = answers.argmax(axis=1)
    n = len(labels)

    def row(chosen: npt.NDArray[np.bool_], predicted: npt.NDArray[np.int64]) -> dict[str, Any]:
        matrix = metrics.confusion(true[chosen], predicted[chosen], n)
        interval = metrics.ua_interval(
            true[chosen], predicted[chosen], n, speakers[chosen], corpora[chosen]
        )
        return {
            "ua": asdict(interval),
            "wa": float(metrics.wa(matrix)),
            "macro_f1": float(metrics.macro_f1(matrix)),
            "ua_plus_wa": float(metrics.ua_plus_wa(matrix)),
        }

    kept = set(pooled(clips))
    inside = np.array([clip in kept for clip in clips])
    matrix = metrics.confusion(true[inside], free[inside], n)
    whole = {
        "clips": int(inside.sum()),
        **row(inside, free),
        "recall": dict(zip(labels, _numbers(metrics.recalls(matrix)), strict=True)),
        "f1": dict(zip(labels, _numbers(metrics.f1(matrix)), strict=True)),
        "confusion": matrix.tolist(),
    }
    if are_probs:
        probs, said = answers[inside], true[inside]
        whole |= {
            "ece": calibration.expected_calibration_error(probs, said),
            "ece_if_calibrated": calibration.error_if_calibrated(probs),
            "nll": calibration.nll(probs, said),
            "reliability": [asdict(one) for one in calibration.reliability(probs, said)],
            "risk": calibration.risk_coverage(probs, said),
        }
    by_corpus = {}
    for name in dict.fromkeys(corpora.tolist()):
        chosen = corpora == name
        by_corpus[name] = {
            "clips": int(chosen.sum()),
            "speakers": sorted(set(speakers[chosen].tolist())),
            "masked": row(chosen, masked),
            "unmasked": row(chosen, free),
        }
    four = [by_corpus[name]["masked"]["ua"]["value"] for name in FOUR if name in by_corpus]
    mean = float(np.mean(four)) if four else None
    return {"pooled": whole, "corpora": by_corpus, "masked_ua_mean": mean}


def brief(scores: Mapping[str, Any]) -> str:
    """Return one line of a score: pooled UA, and the masked UA of every corpus."""
    each = (f"{name} {row['masked']['ua']['value']:.3f}" for name, row in scores["corpora"].items())
    return f"pooled UA {scores['pooled']['ua']['value']:.3f}; masked: {', '.join(each)}"


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Return floats for JSON, which has no nan: None stands for a class without a clip."""
    return [None if np.isnan(value) else float(value) for value in values]
