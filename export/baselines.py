"""What a model must beat: a linear probe of the same hidden states, and MFCC with an SVM.

Both see the clips as recorded, choose their settings on validation clips by the same masked score
that models are judged by, and are then fitted again on train and validation together.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft
import torch
from scipy.signal import savgol_filter
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor
from torch.nn import functional

from export.corpora import Clip, label_mask, read_samples
from export.errors import CorpusError
from export.frontend import LogMel
from export.metrics import Floats, confusion, masked_argmax, ua
from export.model import lift, new_classifier
from export.scores import score
from export.speech import Speech
from export.splits import out_of_fold, speakers
from export.views import View, load_views

MFCC_RATE_HZ = 16000
BANDS = 40
COEFFICIENTS = 20
DELTA_FRAMES = 9  # of 10 ms

INNER_FOLDS = 3

WEIGHTS = (None, "balanced")
PROBE_ALPHAS = (3000.0, 1000.0, 300.0, 100.0)
SVM_COSTS = (1.0, 3.0, 10.0, 30.0, 100.0)
SVM_GAMMAS = (0.001, 0.003, 0.01, 0.03)

Statistics = Mapping[Clip, npt.NDArray[np.float32]]
Settings = dict[str, Any]
Fit = Callable[[Settings, Floats, npt.NDArray[np.int64], Floats], Floats]


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline's answers.

    Attributes:
        name: "linear_probe" or "mfcc_svm".
        settings: The chosen ones, by the name of the setting.
        scores: Shape (N, C), one row for each clip asked; higher is likelier, no probabilities.
    """

    name: str
    settings: Settings
    scores: Floats


def linear_probe(
    statistics: Statistics,
    labels: Sequence[str],
    train: Sequence[Clip],
    asked: Sequence[Clip],
    validation: Sequence[Clip] | None = None,
) -> Baseline:
    """Fit ridge regression from hidden states to one-hot labels, and answer.

    Tried are the statistics of every single state, their average over the states, and all of them
    side by side, with every alpha, with and without weights that make the classes count equally.

    Args:
        statistics: `state_statistics` of all clips named below.
        labels: C of them.
        train: Must have every label.
        asked: N clips to answer; what their emotion is is not read.
        validation: What the settings are chosen on. Without it they are chosen by three folds over
            the speakers of train, as `out_of_fold` needs it.

    Returns:
        Settings `state` (its number, "average" or "all"), `alpha`, `class_weight`, and the scores.

    Raises:
        CorpusError: A label without a train clip, or in the folds, with one of a single speaker.
    """
    states = len(statistics[train[0]])
    grid = [
        {"state": state, "alpha": alpha, "class_weight": weight}
        for state, alpha, weight in itertools.product(
            ("all", "average", *range(states)), PROBE_ALPHAS, WEIGHTS
        )
    ]
    return _best("linear_probe", grid, _ridge, statistics, labels, train, asked, validation)


def mfcc_svm(
    statistics: Statistics,
    labels: Sequence[str],
    train: Sequence[Clip],
    asked: Sequence[Clip],
    validation: Sequence[Clip] | None = None,
) -> Baseline:
    """Fit a support vector machine with a Gaussian kernel to MFCC statistics, and answer.

    Args:
        statistics: `mfcc_statistics` of all clips named below.
        labels: As for `linear_probe`.
        train: As for `linear_probe`.
        asked: As for `linear_probe`.
        validation: As for `linear_probe`.

    Returns:
        Settings `C`, `gamma`, `class_weight`, and the scores.

    Raises:
        CorpusError: As for `linear_probe`.
    """
    grid = [
        {"C": cost, "gamma": gamma, "class_weight": weight}
        for cost, gamma, weight in itertools.product(SVM_COSTS, SVM_GAMMAS, WEIGHTS)
    ]
    return _best("mfcc_svm", grid, _svc, statistics, labels, train, asked, validation)


def state_statistics(
    views: Sequence[View], clips: Sequence[Clip], pretrained: Callable[[Tensor], Tensor]
) -> Statistics:
    """Return mean and standard deviation over the frames of each clip's hidden states.

    The states are layer-normalised first, as the head sees them.

    Args:
        views: With `states` (S, F, D); only those of number 0, all windows of a clip, are read.
        clips: In the order that `View.clip` counts.
        pretrained: `export.model.lift` of the network before training.

    Returns:
        float32 (S, 2 D) for each clip.
    """
    windows: dict[int, list[torch.Tensor]] = {}
    for view in views:
        if view.number == 0 and view.clip < len(clips):
            states = pretrained(torch.from_numpy(view.arrays["states"])[None])[0]
            windows.setdefault(view.clip, []).append(states)
    found = {}
    for place, parts in windows.items():
        states = torch.cat(parts, dim=1).float()
        states = functional.layer_norm(states, states.shape[-1:])  # (S, F, D)
        spread, mean = torch.std_mean(states, dim=1, correction=0)
        found[clips[place]] = torch.cat([mean, spread], dim=1).numpy()
    return found


def mfcc_statistics(clips: Sequence[Clip]) -> Statistics:
    """Return mean and standard deviation over the frames of each clip's `mfcc`: (120,) float32.

    Raises:
        AudioError: A file is not one that the runtime takes.
    """
    log_mel = LogMel(BANDS, MFCC_RATE_HZ)
    found = {}
    for clip in clips:
        with torch.no_grad():
            samples = torch.from_numpy(read_samples(clip, MFCC_RATE_HZ))
            frames = mfcc(log_mel(samples[None])[0].numpy())
        found[clip] = np.concatenate([frames.mean(axis=1), frames.std(axis=1)])
    return found


def mfcc(log_mel: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return 20 MFCC, their slopes, and the slopes of these: log-mel (bands, F) to (60, F).

    A slope is that of the regression line through nine frames, d_t = sum_n n c_(t + n) / sum_n n^2
    with n from -4 to 4 (Furui, IEEE TASSP 34(1), 1986), the outermost frames repeated.
    """
    cepstrum = scipy.fft.dct(log_mel, axis=0, norm="ortho")[:COEFFICIENTS]
    slope = savgol_filter(cepstrum, DELTA_FRAMES, 1, deriv=1, mode="nearest")
    again = savgol_filter(slope, DELTA_FRAMES, 1, deriv=1, mode="nearest")
    return np.concatenate([cepstrum, slope, again]).astype(np.float32)


def masked_ua(
    scores: Floats,
    clips: Sequence[Clip],
    labels: Sequence[str],
    masks: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, float]:
    """Return the UA of each corpus when only the labels that it has may be answered.

    Args:
        scores: Shape (N, C), probs or others.
        clips: N clips.
        labels: C labels.
        masks: `label_mask` of the clips that say which labels a corpus has.
    """
    true = _classes(clips, labels)
    found = {}
    for corpus in dict.fromkeys(clip.corpus for clip in clips):
        inside = [clip.corpus == corpus for clip in clips]
        predicted = masked_argmax(scores[inside], masks[corpus])
        found[corpus] = float(ua(confusion(true[inside], predicted, len(labels))))
    return found


def _classes(clips: Sequence[Clip], labels: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.array([labels.index(clip.emotion) for clip in clips])


def _best(
    name: str,
    grid: Sequence[Settings],
    fit: Fit,
    statistics: Statistics,
    labels: Sequence[str],
    train: Sequence[Clip],
    asked: Sequence[Clip],
    validation: Sequence[Clip] | None,
) -> Baseline:
    """Choose by the mean over corpora of their masked UA; of equals the first of the grid."""

    def answer(settings: Settings, heard: Sequence[Clip], unheard: Sequence[Clip]) -> Floats:
        known = np.stack([statistics[clip] for clip in heard])
        unknown = np.stack([statistics[clip] for clip in unheard])
        return fit(settings, known, _classes(heard, labels), unknown)

    def score(settings: Settings) -> float:
        if validation is None:
            k = min(INNER_FOLDS, len(speakers(train)))
            judged = train
            scores = out_of_fold(train, k, 0, lambda one, other: answer(settings, one, other))
        else:
            judged = validation
            scores = answer(settings, train, validation)
        return float(np.mean(list(masked_ua(scores, judged, labels, masks).values())))

    absent = sorted(set(labels) - {clip.emotion for clip in train})
    if absent:
        raise CorpusError(f"no clip of {absent[0]!r} in train, needed is one of every label")
    heard = (*train, *(validation or ()))
    masks = label_mask(heard, labels)
    best = max(grid, key=score)
    return Baseline(name, best, answer(best, heard, asked))


def _ridge(
    settings: Settings, known: Floats, classes: npt.NDArray[np.int64], unknown: Floats
) -> Floats:
    state = settings["state"]

    def inputs(of_all: Floats) -> Floats:
        if state == "all":
            return of_all.reshape(len(of_all), -1)
        return of_all.mean(axis=1) if state == "average" else of_all[:, state]

    known, unknown = inputs(known), inputs(unknown)
    scaler = StandardScaler()
    model = Ridge(settings["alpha"]).fit(
        scaler.fit_transform(known),
        np.eye(classes.max() + 1, dtype=np.float32)[classes],
        compute_sample_weight(settings["class_weight"], classes),
    )
    return model.predict(scaler.transform(unknown)).astype(np.float64)


def _svc(
    settings: Settings, known: Floats, classes: npt.NDArray[np.int64], unknown: Floats
) -> Floats:
    scaler = StandardScaler()
    model = SVC(**settings).fit(scaler.fit_transform(known), classes)
    scores = model.decision_function(scaler.transform(unknown))
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)  # two labels


def make_baselines(speech: Speech, weights: Path | None, features: Path, folder: Path) -> None:
    """The stage: score both baselines on the test speakers, ``baselines.json``.

    Args:
        speech: Clips and split.
        weights: Folder of pretrained checkpoints.
        features: The folder of the encoder's views.
        folder: Takes the file.
    """
    heard = (speech.split.train, speech.split.test, speech.split.validation)
    pretrained = lift(speech.recipe, new_classifier(speech.recipe, weights))
    states = state_statistics(load_views(features), speech.clips, pretrained)
    probe = linear_probe(states, speech.labels, *heard)
    svm = mfcc_svm(mfcc_statistics(speech.clips), speech.labels, *heard)
    found = {
        baseline.name: {
            "settings": baseline.settings,
            **score(
                baseline.scores, speech.split.test, speech.labels, speech.masks, are_probs=False
            ),
        }
        for baseline in (probe, svm)
    }
    (folder / "baselines.json").write_text(json.dumps(found, indent=1))
