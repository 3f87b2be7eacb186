from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    recall_score,
)

from export.calibration import error_if_calibrated
from export.corpora import Clip, family
from export.scores import brief, score

LABELS = ("anger", "fear", "sadness")
MASKS = {
    "emodb": np.array([True, True, True]),
    "emodb_2s": np.array([True, True, True]),
    "nemo": np.array([True, False, True]),
}


def clip(corpus, number, emotion, speaker):
    return Clip(corpus, family(corpus), Path(f"{number}.wav"), emotion, speaker, "", "en", 1.0)


def case():
    """Return clips of three corpora, all labels in each as its mask says, and random probs."""
    clips = []
    for corpus, mask in MASKS.items():
        there = [label for label, has in zip(LABELS, mask, strict=True) if has]
        clips += [clip(corpus, n, there[n % len(there)], str(n % 2)) for n in range(12)]
    probs = np.random.default_rng(3).dirichlet(np.ones(3), len(clips))
    return clips, probs


def answers(clips, probs, corpora):
    inside = [clip.corpus in corpora for clip in clips]
    true = [LABELS.index(clip.emotion) for clip in clips if clip.corpus in corpora]
    return np.array(true), probs[inside]


def test_pooled_scores_are_those_of_scikit_learn_without_emodb():
    clips, probs = case()
    pooled = score(probs, clips, LABELS, MASKS)["pooled"]
    true, inside = answers(clips, probs, ("emodb_2s", "nemo"))
    found = inside.argmax(axis=1)
    assert pooled["clips"] == 24
    assert pooled["ua"]["value"] == pytest.approx(balanced_accuracy_score(true, found))
    assert pooled["wa"] == pytest.approx(accuracy_score(true, found))
    assert pooled["macro_f1"] == pytest.approx(f1_score(true, found, average="macro"))
    assert pooled["ua_plus_wa"] == pytest.approx(pooled["ua"]["value"] + pooled["wa"])
    recalls = recall_score(true, found, average=None)
    assert pooled["recall"] == pytest.approx(dict(zip(LABELS, recalls, strict=True)))
    f1s = f1_score(true, found, average=None)
    assert pooled["f1"] == pytest.approx(dict(zip(LABELS, f1s, strict=True)))
    assert pooled["confusion"] == confusion_matrix(true, found).tolist()
    assert pooled["nll"] == pytest.approx(log_loss(true, inside))
    assert 0 <= pooled["ece"] <= 1
    assert pooled["ece_if_calibrated"] == error_if_calibrated(inside)
    assert pooled["ua"]["low"] <= pooled["ua"]["value"] <= pooled["ua"]["high"]


@pytest.mark.parametrize("corpus", MASKS)
def test_a_corpus_is_scored_among_its_own_labels_and_among_all(corpus):
    clips, probs = case()
    row = score(probs, clips, LABELS, MASKS)["corpora"][corpus]
    true, inside = answers(clips, probs, (corpus,))
    own = np.where(MASKS[corpus], inside, -1).argmax(axis=1)
    present = sorted(set(true))
    assert row["clips"] == 12
    assert row["speakers"] == [f"{family(corpus)}/0", f"{family(corpus)}/1"]
    for kind, found in (("masked", own), ("unmasked", inside.argmax(axis=1))):
        expected = recall_score(true, found, labels=present, average="macro")
        assert row[kind]["ua"]["value"] == pytest.approx(expected)
        assert row[kind]["wa"] == pytest.approx(accuracy_score(true, found))


def test_the_masked_mean_is_over_the_four_corpora_that_are_there():
    clips, probs = case()
    found = score(probs, clips, LABELS, MASKS)
    two = [found["corpora"][name]["masked"]["ua"]["value"] for name in ("emodb_2s", "nemo")]
    assert found["masked_ua_mean"] == pytest.approx(np.mean(two))
    assert found["masked_ua_mean"] != pytest.approx(
        np.mean([*two, found["corpora"]["emodb"]["masked"]["ua"]["value"]])
    )


def test_without_any_of_the_four_there_is_no_mean():
    clips = [clip("mine", n, LABELS[n % 3], "1") for n in range(6)]
    masks = {"mine": np.ones(3, bool)}
    assert score(np.eye(3)[[0, 1, 2] * 2], clips, LABELS, masks)["masked_ua_mean"] is None


def test_scores_of_any_scale_have_no_calibration():
    clips, probs = case()
    probs_too = score(probs, clips, LABELS, MASKS)
    scaled = score(100 * probs - 50, clips, LABELS, MASKS, are_probs=False)
    assert not {"ece", "nll"} & scaled["pooled"].keys()
    assert scaled["corpora"] == probs_too["corpora"]


def test_a_label_without_a_clip_has_no_recall():
    clips = [clip("nemo", n, LABELS[2 * (n % 2)], "1") for n in range(6)]
    found = score(np.eye(3)[[0, 2] * 3], clips, LABELS, MASKS)["pooled"]
    assert found["recall"] == {"anger": 1.0, "fear": None, "sadness": 1.0}
    assert found["ua"]["value"] == 1.0


def test_brief_is_one_line():
    clips = [clip("nemo", n, LABELS[2 * (n % 2)], "1") for n in range(6)]
    probs = np.eye(3)[[0, 2, 0, 2, 0, 0]]
    probs[5] = 0.1, 0.6, 0.3  # fear, which nemo does not have; without it sadness
    line = brief(score(probs, clips, LABELS, MASKS))
    assert line == "pooled UA 0.833; masked: nemo 1.000"
