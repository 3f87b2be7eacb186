import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
from sklearn.linear_model import Ridge
from sklearn.metrics import recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.class_weight import compute_sample_weight

from export.baselines import (
    PROBE_ALPHAS,
    WEIGHTS,
    linear_probe,
    masked_ua,
    mfcc,
    mfcc_statistics,
    mfcc_svm,
    state_statistics,
)
from export.corpora import Clip, label_mask, load_corpora
from export.errors import CorpusError
from export.splits import folds, out_of_fold
from export.views import View

LABELS = ("anger", "fear", "sadness")
SEEDS = (2, 5, 9)  # whose choice by unmasked UA would be another
HAS = {"one": LABELS, "two": LABELS[:2]}


def clips_of(speakers, each=4):
    """Clips of corpora `one`, which has every label, and `two`, which lacks the last."""
    return tuple(
        Clip(corpus, corpus, Path(f"{corpus}/{who}{label}{i}"), label, str(who), "", "en", 1.0)
        for corpus, has in HAS.items()
        for who, label, i in itertools.product(speakers, has, range(each))
    )


TRAIN, VALIDATION, ASKED = clips_of(range(4)), clips_of([4, 5]), clips_of([6])
ALL = (*TRAIN, *VALIDATION, *ASKED)


def noisy(told, spread, seed=0):
    """Statistics (2, 6) of noise; the rows `told` also tell the label."""
    rng = np.random.default_rng(seed)
    found = {}
    for clip in ALL:
        statistics = rng.standard_normal((2, 6)) * spread
        statistics[told, LABELS.index(clip.emotion)] += 1
        found[clip] = statistics.astype(np.float32)
    return found


def classes(clips):
    return np.array([LABELS.index(clip.emotion) for clip in clips])


def probe_by_hand(statistics, settings, heard, asked):
    state = settings["state"]
    x = {
        clip: {"average": sum(statistics[clip]) / 2, "all": statistics[clip].ravel()}.get(
            state, statistics[clip][state if state in (0, 1) else 0]
        )
        for clip in (*heard, *asked)
    }
    model = make_pipeline(StandardScaler(), Ridge(settings["alpha"]))
    weights = compute_sample_weight(settings["class_weight"], classes(heard))
    targets = np.eye(3)[classes(heard)]
    model.fit(np.stack([x[clip] for clip in heard]), targets, ridge__sample_weight=weights)
    return model.predict(np.stack([x[clip] for clip in asked]))


def ua_by_hand(scores, clips, masked=True):
    """Mean over corpora, with scikit-learn's recall."""
    found = []
    for corpus, has in HAS.items():
        inside = [clip.corpus == corpus for clip in clips]
        allowed = np.array([LABELS.index(label) for label in (has if masked else LABELS)])
        predicted = allowed[scores[inside][:, allowed].argmax(axis=1)]
        true = classes(clips)[inside]
        found.append(recall_score(true, predicted, average="macro", labels=np.unique(true)))
    return np.mean(found)


def best_by_hand(score):
    """The settings of the probe with the highest score, the first of several."""
    grid = itertools.product(("all", "average", 0, 1), PROBE_ALPHAS, WEIGHTS)
    names = ("state", "alpha", "class_weight")
    return max((dict(zip(names, values, strict=True)) for values in grid), key=score)


def test_masked_ua_of_a_case_counted_by_hand():
    scores = np.array([[3, 2, 1], [3, 2, 1], [1, 2, 3], [1, 2, 3], [1, 2, 3.0]])
    truth = [("one", "anger"), ("one", "sadness"), ("one", "sadness"), ("two", "fear")]
    truth.append(("two", "anger"))
    clips = [replace(TRAIN[0], corpus=corpus, emotion=label) for corpus, label in truth]
    # `two` may not answer sadness, so both its clips are answered fear: recalls 1 and 0.
    found = masked_ua(scores, clips, LABELS, label_mask(TRAIN, LABELS))
    assert found == {"one": (1 / 1 + 1 / 2) / 2, "two": (1 + 0) / 2}


def test_statistics_are_over_all_frames_of_the_normalised_states_of_view_0():
    rng = np.random.default_rng(0)
    long, short, other = (rng.normal(3, 5, (2, f, 4)).astype(np.float16) for f in (7, 3, 5))
    views = [
        View(1, 0, {"states": other}),
        View(0, 0, {"states": long}),
        View(0, 0, {"states": short}),
        View(0, 1, {"states": other}),  # augmented: not read
    ]
    found = state_statistics(views, TRAIN[:2], lambda states: states)
    assert list(found) == [TRAIN[1], TRAIN[0]]
    frames = np.concatenate([long, short], axis=1).astype(np.float64)  # (2, 10, 4)
    centred = frames - frames.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(frames.var(axis=-1, keepdims=True) + 1e-5)
    expected = [np.concatenate([s.mean(axis=0), s.std(axis=0)]) for s in normed]
    np.testing.assert_allclose(found[TRAIN[0]], expected, atol=1e-6)


def test_cepstra_and_slopes_match_their_formulas():
    log_mel = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    band = np.arange(40) + 0.5
    dct = np.cos(np.pi / 40 * np.outer(np.arange(20), band)) * np.sqrt(2 / 40)
    dct[0] /= np.sqrt(2)
    found = mfcc(log_mel)
    assert found.shape == (60, 30)
    np.testing.assert_allclose(found[:20], dct @ log_mel, atol=1e-5)
    for first in (0, 20):  # slopes of the cepstra, and of the slopes
        padded = np.pad(found[first : first + 20].astype(np.float64), ((0, 0), (4, 4)), "edge")
        slope = sum(n * padded[:, 4 + n : 34 + n] for n in range(-4, 5)) / 60  # sum of n^2
        np.testing.assert_allclose(found[first + 20 : first + 40], slope, atol=1e-5)


def test_gain_moves_the_mean_of_the_first_cepstrum_alone(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(12000)
    clips = []
    for name, gain in (("soft", 1), ("loud", 2)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, gain * noise, 16000, subtype="FLOAT")
        clips.append(replace(TRAIN[0], path=path))
    found = mfcc_statistics(clips)
    soft, loud = (found[clip] for clip in clips)
    assert soft.shape == (120,) and soft.dtype == np.float32
    expected = np.zeros(120)
    expected[0] = np.log10(4) * 40 / np.sqrt(40)  # every band rises by log10(4)
    np.testing.assert_allclose(loud - soft, expected, atol=1e-4)


def test_a_recording_is_resampled_and_only_its_duration_counts_the_frames(tmp_path):
    tone = 0.1 * np.sin(2 * np.pi * 500 * np.arange(44100) / 44100)
    clips = []
    for rate_hz in (44100, 16000):
        path = tmp_path / f"{rate_hz}.wav"
        samples = scipy.signal.resample(tone, rate_hz)
        soundfile.write(path, samples, rate_hz, subtype="FLOAT")
        clips.append(replace(TRAIN[0], path=path))
    found = mfcc_statistics(clips)
    one, other = (found[clip][:20] for clip in clips)
    np.testing.assert_allclose(one, other, atol=0.5)


def test_the_probe_finds_the_state_that_tells():
    found = linear_probe(noisy(told=1, spread=0.5), LABELS, TRAIN, ASKED, VALIDATION)
    assert found.name == "linear_probe"
    assert found.settings["state"] == 1
    assert ua_by_hand(found.scores, ASKED) > 0.7


def test_the_probe_takes_states_together_that_tell_together():
    found = linear_probe(noisy(told=[0, 1], spread=1.0), LABELS, TRAIN, ASKED, VALIDATION)
    assert found.settings["state"] in ("all", "average")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_probe_chooses_by_masked_validation_ua_and_is_fitted_again_on_both(seed):
    statistics = noisy(told=0, spread=1.0, seed=seed)

    def score(settings, masked=True):
        scores = probe_by_hand(statistics, settings, TRAIN, VALIDATION)
        return ua_by_hand(scores, VALIDATION, masked)

    found = linear_probe(statistics, LABELS, TRAIN, ASKED, VALIDATION)
    assert found.settings == best_by_hand(score)
    assert found.settings != best_by_hand(lambda settings: score(settings, masked=False))
    expected = probe_by_hand(statistics, found.settings, (*TRAIN, *VALIDATION), ASKED)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)


def test_without_validation_clips_the_speakers_of_train_are_dealt_to_three_folds():
    statistics = noisy(told=0, spread=1.0, seed=1)
    fold = folds(TRAIN, 3, 0)

    def score(settings):
        scores = np.zeros((len(TRAIN), 3))
        for held_out in range(3):
            one = [clip for clip, where in zip(TRAIN, fold, strict=True) if where != held_out]
            other = [clip for clip, where in zip(TRAIN, fold, strict=True) if where == held_out]
            scores[fold == held_out] = probe_by_hand(statistics, settings, one, other)
        return ua_by_hand(scores, TRAIN)

    found = linear_probe(statistics, LABELS, TRAIN, ASKED)
    assert found.settings == best_by_hand(score)
    expected = probe_by_hand(statistics, found.settings, TRAIN, ASKED)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)


@pytest.mark.parametrize("fit", [linear_probe, mfcc_svm])
@pytest.mark.parametrize("validation", [VALIDATION, None])
def test_nothing_is_learnt_from_the_asked_clips(fit, validation):
    statistics = noisy(told=0, spread=1.0, seed=2)
    if fit is mfcc_svm:
        statistics = {clip: array[0] for clip, array in statistics.items()}
    before = fit(statistics, LABELS, TRAIN, ASKED, validation)
    # Corpus `two` has no other sadness: it would be a label of it if this were read.
    other_truth = [
        replace(c, path=Path(f"asked/{i}"), emotion="sadness") for i, c in enumerate(ASKED)
    ]
    changed = dict(statistics)
    changed |= {new: statistics[old] for new, old in zip(other_truth, ASKED, strict=True)}
    changed[other_truth[0]] = 1000 * statistics[ASKED[0]]
    after = fit(changed, LABELS, TRAIN, other_truth, validation)
    assert after.settings == before.settings
    np.testing.assert_allclose(after.scores[1:], before.scores[1:], rtol=1e-6)
    assert not np.allclose(after.scores[0], before.scores[0])


def test_the_probe_answers_out_of_fold_in_one_line():
    statistics = noisy(told=0, spread=0.1)
    answers = out_of_fold(
        ALL, 3, 0, lambda train, asked: linear_probe(statistics, LABELS, train, asked).scores
    )
    np.testing.assert_array_equal(answers.argmax(axis=1), classes(ALL))


def test_the_svm_parts_what_no_line_parts_and_equals_scikit_learn():
    rng = np.random.default_rng(0)
    statistics = {}
    for clip in ALL:  # rings about the origin
        angle, radius = rng.uniform(0, 2 * np.pi), 1 + LABELS.index(clip.emotion)
        statistics[clip] = np.array([np.cos(angle), np.sin(angle)], np.float32) * radius
        statistics[clip] = np.append(statistics[clip], np.float32(0))  # constant: no scale
    found = mfcc_svm(statistics, LABELS, TRAIN, ASKED, VALIDATION)
    assert found.name == "mfcc_svm"
    assert set(found.settings) == {"C", "gamma", "class_weight"}
    heard = (*TRAIN, *VALIDATION)
    model = make_pipeline(StandardScaler(), SVC(kernel="rbf", **found.settings))
    model.fit(np.stack([statistics[clip] for clip in heard]), classes(heard))
    x = np.stack([statistics[clip] for clip in ASKED])
    np.testing.assert_allclose(found.scores, model.decision_function(x))
    np.testing.assert_array_equal(found.scores.argmax(axis=1), model.predict(x))
    probe = {clip: array[None] for clip, array in statistics.items()}
    line = linear_probe(probe, LABELS, TRAIN, ASKED, VALIDATION)
    assert ua_by_hand(found.scores, ASKED) > 0.9 > ua_by_hand(line.scores, ASKED)


@pytest.mark.parametrize("fit", [linear_probe, mfcc_svm])
def test_two_labels_have_two_columns(fit):
    statistics = {clip: np.eye(3)[classes([clip])[0]] for clip in ALL}
    if fit is linear_probe:
        statistics = {clip: array[None] for clip, array in statistics.items()}
    train, asked = ([c for c in clips if c.corpus == "two"] for clips in (TRAIN, ASKED))
    found = fit(statistics, LABELS[:2], train, asked)
    assert found.scores.shape == (len(asked), 2)
    np.testing.assert_array_equal(found.scores.argmax(axis=1), classes(asked))


@pytest.mark.parametrize("fit", [linear_probe, mfcc_svm])
def test_a_label_without_a_train_clip_is_refused(fit):
    statistics = noisy(told=0, spread=0.1)
    train = [clip for clip in TRAIN if clip.emotion != "fear"]
    with pytest.raises(CorpusError) as caught:
        fit(statistics, LABELS, train, ASKED, VALIDATION)
    assert str(caught.value) == "no clip of 'fear' in train, needed is one of every label"


@pytest.mark.corpora
def test_the_svm_hears_emotions_of_unheard_speakers():
    root = os.environ.get("EDGE_SER_CORPORA")
    if not root:
        pytest.skip("EDGE_SER_CORPORA is not set")
    emotions = ("anger", "happiness", "neutral", "sadness")
    clips = [c for c in load_corpora(Path(root), ["emodb"]) if c.emotion in emotions]
    train = [clip for clip in clips if clip.speaker not in ("03", "08", "11", "16")]
    asked = [clip for clip in clips if clip.speaker in ("03", "08")]
    labels = [label for label in emotions if any(clip.emotion == label for clip in train)]
    found = mfcc_svm(mfcc_statistics([*train, *asked]), labels, train, asked)
    masks = label_mask(train, labels)
    assert masked_ua(found.scores, asked, labels, masks)["emodb"] > 0.6  # chance is 0.25
