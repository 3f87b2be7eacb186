"""How sure an answer is: temperature and abstain threshold, from speakers that were not heard."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from edge_ser.recognizer import probabilities
from export.calibration import nll
from export.corpora import Clip
from export.metrics import Floats, Ints
from export.scores import brief, score
from export.speech import Speech

TEMPERATURES = (0.1, 10.0)
"""Where a temperature is looked for; answers that are all right would drive it to zero."""


def clip_probs(logits: Sequence[npt.NDArray[np.floating]], temperature: float = 1.0) -> Floats:
    """Return the probs (N, C) of clips as the runtime computes them, from their windows' logits.

    Args:
        logits: Of each of N clips, shape (W, C) with W of its own.
        temperature: Above 0.
    """
    starts = np.cumsum([0, *(len(windows) for windows in logits[:-1])])
    counts = np.array([len(windows) for windows in logits])
    of_windows = probabilities(np.concatenate(logits), temperature)
    return np.add.reduceat(of_windows, starts) / counts[:, None]


def fit_temperature(logits: Sequence[npt.NDArray[np.floating]], true: Ints) -> float:
    """Return the temperature that makes the probs of clips most likely (Guo et al., ICML 2017).

    All labels compete, also where a corpus lacks some: the runtime does not know the corpus.

    Args:
        logits: Of each of N validation clips, shape (W, C).
        true: Class of each clip, shape (N,).

    Returns:
        The T in TEMPERATURES with the least negative log-likelihood of `clip_probs`, exact to about
        1e-5 of its value. Above 1 the logits were too sure.
    """
    found = minimize_scalar(
        lambda log_t: nll(clip_probs(logits, float(np.exp(log_t))), true),
        bounds=np.log(TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


def abstain_threshold(probs: Floats, true: Ints) -> float:
    """Return the confidence below which an answer is called uncertain.

    It is the largest threshold for which at most half of the answers below it are right: what is
    called uncertain is then, taken together, wrong at least as often as right.

    Args:
        probs: Of N validation clips, calibrated, shape (N, C).
        true: Class of each clip, shape (N,).

    Returns:
        One of the confidences, or 1.0 if all answers below 1.0 are to be doubted, or 0.0 if no
        threshold has this property: then no answer is uncertain.
    """
    confidence = probs.max(axis=1)
    right = (probs.argmax(axis=1) == true)[np.argsort(confidence)]
    thresholds = np.append(np.unique(confidence), 1.0)
    below = np.searchsorted(np.sort(confidence), thresholds, side="left")
    rights_below = np.concatenate([[0], np.cumsum(right)])[below]
    doubtful = (below > 0) & (2 * rights_below <= below)
    return float(thresholds[doubtful].max(initial=0.0))


def write_confidence(
    speech: Speech,
    clips: Sequence[Clip],
    logits: Sequence[npt.NDArray[np.floating]],
    folder: Path,
) -> float:
    """Fit temperature and threshold: ``confidence.json``.

    Args:
        speech: Labels, and which of them each corpus has.
        clips: N clips, none of a test speaker.
        logits: Of each clip, shape (W, C), by a network that has not heard its speaker.
        folder: Takes the file, with the scores beside.

    Returns:
        The temperature.
    """
    true = np.array([speech.labels.index(clip.emotion) for clip in clips])
    temperature = fit_temperature(logits, true)
    probs = clip_probs(logits, temperature)
    scores = score(probs, clips, speech.labels, speech.masks)
    tqdm.write(f"speakers not heard: {brief(scores)}")
    found = {
        "temperature": temperature,
        "abstain_below": abstain_threshold(probs, true),
        "scores": scores,
    }
    (folder / "confidence.json").write_text(json.dumps(found, indent=1))
    return temperature
