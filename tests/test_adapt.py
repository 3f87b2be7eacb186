from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_ser.adaptation import Adaptation, History
from export import adapt
from export.adapt import (
    KINDS,
    ShiftNetwork,
    adapted,
    draw_history,
    fit_adaptation,
    groups_of,
    history_of,
    measure,
    parts_of,
)
from export.corpora import Clip

EMOTIONS = ("anger", "neutral", "sadness")


def clip(speaker, emotion, number, corpus="ravdess"):
    path = Path(f"{speaker}-{emotion}-{number}.wav")
    return Clip(corpus, corpus, path, emotion, speaker, "f", "en", 1.0)


def test_a_clip_is_heard_with_the_others_of_its_speaker_and_folder():
    clips = [
        clip("1", "anger", 0), clip("2", "anger", 0), clip("1", "neutral", 0),
        clip("1", "anger", 0, "emodb"), clip("1", "sadness", 0),
    ]  # fmt: skip
    found = [group.tolist() for group in groups_of(clips)]
    assert found == [[2, 4], [], [0, 4], [], [0, 2]]


LABELS = np.repeat([0, 1, 2], [10, 40, 10])


@pytest.mark.parametrize(
    ("kind", "count", "most", "other"),
    [("skewed", 10, 8, 2), ("skewed", 5, 4, 1), ("skewed", 1, 1, 0), ("single", 7, 7, 0)],
)
def test_histories_have_the_shares_that_their_kind_says(kind, count, most, other):
    rng = np.random.default_rng(0)
    frequent = Counter()
    for _ in range(200):
        drawn = draw_history(rng, np.arange(60), LABELS, kind, count)
        assert len(set(drawn.tolist())) == len(drawn) == count
        counts = np.bincount(LABELS[drawn], minlength=3)
        assert counts.max() == most
        assert counts.sum() - counts.max() == other
        frequent[int(counts.argmax())] += 1
    assert min(frequent.values()) > 40  # each emotion is the frequent one alike


def test_a_balanced_history_has_rare_emotions_as_often():
    rng = np.random.default_rng(0)
    drawn = [draw_history(rng, np.arange(60), LABELS, "balanced", 3) for _ in range(500)]
    shares = np.bincount(LABELS[np.concatenate(drawn)]) / 1500
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


@given(st.sampled_from(KINDS), st.integers(1, 50), st.integers(0, 60), st.integers(0, 99))
def test_a_history_holds_other_utterances_once_each(kind, count, there, seed):
    among = np.arange(there)
    drawn = draw_history(np.random.default_rng(seed), among, LABELS, kind, count)
    assert len(set(drawn.tolist())) == len(drawn) <= min(count, there)
    assert set(drawn.tolist()) <= set(among.tolist())
    if there:
        assert len(drawn)


def test_parts_add_up_to_the_runtimes_history():
    logits = np.random.default_rng(0).normal(size=(9, 4))
    history = History.empty(4)
    for utterance in logits[[5, 2, 8]]:
        history.add(utterance)
    found = history_of(parts_of(logits)[[5, 2, 8]])
    assert found.count == 3
    np.testing.assert_allclose(found.features(), history.features())


def test_the_trained_network_is_the_one_that_the_runtime_applies():
    torch.manual_seed(0)
    network = ShiftNetwork()
    torch.nn.init.normal_(network.last)
    history = history_of(parts_of(np.random.default_rng(0).normal(size=(6, 4))))
    seen = torch.from_numpy(history.features()).float()[None]
    with torch.no_grad():
        expected = network(seen, torch.tensor([6.0]))[0]
    np.testing.assert_allclose(network.finish().shift(history), expected, atol=1e-5)


def voices(speakers, seed):
    """Return clips, labels and logits of speakers each of whom is shifted by a bias of his own."""
    rng = np.random.default_rng(seed)
    clips, logits = [], []
    for speaker in range(speakers):
        bias = 1.5 * rng.standard_normal(3)
        for number in range(24):
            clips.append(clip(f"{seed}-{speaker}", EMOTIONS[number % 3], number))
            logits.append(2 * np.eye(3)[number % 3] + bias + 0.7 * rng.standard_normal(3))
    labels = np.array([EMOTIONS.index(c.emotion) for c in clips])
    return clips, labels, np.array(logits)


@pytest.fixture(scope="module")
def learned():
    clips, labels, logits = voices(24, seed=0)
    mask, weights = np.ones((len(clips), 3), bool), np.ones(len(clips))
    return fit_adaptation(logits, clips, labels, mask, weights)


def test_a_bias_of_the_speaker_is_learned_from_utterances_of_others(learned):
    clips, labels, logits = voices(12, seed=1)
    mask = np.ones((len(clips), 3), bool)
    rows = measure(logits, [learned] * len(clips), clips, labels, mask, 3)
    ua = {(row["history"], row["utterances"]): row["pooled_ua"] for row in rows}
    without = ua["none", 0]
    assert without == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert ua["balanced", 20] > without + 0.1
    assert ua["balanced", 20] > ua["balanced", 2]
    assert ua["single", 5] > without - 0.02
    gain = next(row for row in rows if row["utterances"] == 20)["gain"]
    assert gain["low"] > 0
    assert gain["unit"] == "speaker"
    assert rows[0]["masked_ua"] == {"ravdess": pytest.approx(without)}


def test_an_answer_depends_on_earlier_utterances_only(learned):
    clips, labels, logits = voices(2, seed=2)
    among = groups_of(clips)
    other = logits.copy()
    other[0] += [0.5, -1.0, 0.0]  # its own logits are shifted by what the others tell
    one, two = (
        adapted(each, [learned] * len(clips), among, labels, "balanced", 10, 0)
        for each in (logits, other)
    )
    np.testing.assert_allclose(two[0] - one[0], [0.5, -1.0, 0.0], atol=1e-12)
    np.testing.assert_array_equal(two[24:], one[24:])  # the other speaker's


def test_a_clip_without_others_is_answered_as_it_is():
    shift = Adaptation(np.ones((5, 1)), np.ones((2, 1)), np.ones(1), half=1.0)
    logits = np.array([[1.0, 2.0, 3.0]])
    found = adapted(logits, [shift], [np.zeros(0, np.int64)], np.array([0]), "single", 5, 0)
    np.testing.assert_array_equal(found, logits)
    assert shift.shift(History.empty(3)).tolist() == [0, 0, 0]


def test_the_same_seed_gives_the_same_network(monkeypatch):
    monkeypatch.setattr(adapt, "EPOCHS", 2)
    clips, labels, logits = voices(4, seed=3)
    mask, weights = np.ones((len(clips), 3), bool), np.ones(len(clips))
    one, two, other = (
        fit_adaptation(logits, clips, labels, mask, weights, seed).to_json() for seed in (0, 0, 1)
    )
    assert one == two != other
