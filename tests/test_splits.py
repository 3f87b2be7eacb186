import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.corpora import Clip, family, load_corpora, select
from export.errors import CorpusError
from export.splits import (
    TEST_SPEAKERS,
    Split,
    draw,
    folds,
    out_of_fold,
    pooled,
    speakers,
    split,
)


def clip(corpus, speaker, emotion="anger", number=0, gender="f"):
    path = Path(f"{corpus}/{speaker}_{emotion}_{number}.flac")
    return Clip(corpus, family(corpus), path, emotion, speaker, gender, "en", 1.0)


FOUR = [
    clip("x", who, emotion, number)
    for who in ("1", "2", "3", "4")
    for emotion in ("anger", "fear")
    for number in (0, 1)
]


def test_the_test_speakers_are_those_of_the_design():
    assert set(TEST_SPEAKERS) == {
        *("ravdess/16", "ravdess/17", "ravdess/18", "ravdess/19"),
        *("emodb/11", "emodb/16", "nemo/IC0", "nemo/WR0", "turev/1358", "turev/6783"),
    }


def test_each_speaker_lies_on_one_side():
    parts = split(FOUR, ["x/2"], test=["x/4"], calibration_clips=3)
    assert speakers(parts.train) == {"x/1", "x/3"}
    assert speakers(parts.validation) == {"x/2"}
    assert speakers(parts.test) == {"x/4"}
    assert len(parts.train) + len(parts.validation) + len(parts.test) == len(FOUR)
    assert len(parts.calibration) == 3
    assert speakers(parts.calibration) <= {"x/1", "x/3"}


def test_one_speaker_of_two_corpora_of_a_family_is_one_speaker():
    clips = [clip("emodb", "11"), clip("emodb_2s", "11"), clip("emodb", "03"), clip("emodb", "16")]
    parts = split(clips, [], calibration_clips=1)
    assert {one.corpus for one in parts.test} == {"emodb", "emodb_2s"}
    assert speakers(parts.train) == {"emodb/03"}


def test_fixed_test_speakers_of_an_absent_family_do_no_harm():
    parts = split(FOUR, ["x/1"], calibration_clips=1)
    assert parts.test == ()


def test_a_fixed_test_speaker_missing_from_its_corpus_is_an_error():
    clips = [clip("turev", "1"), clip("turev", "1358")]
    with pytest.raises(CorpusError, match="no clip of speaker 'turev/6783', there are"):
        split(clips, [])


@pytest.mark.parametrize(
    ("validation", "calibration", "test", "message"),
    [
        (["x/9"], None, [], "no clip of speaker 'x/9', there are ['x/1', 'x/2', 'x/3', 'x/4']"),
        (["y/1"], None, [], "no clip of speaker 'y/1', there are ['x/1', 'x/2', 'x/3', 'x/4']"),
        ([], None, ["y/1"], "no clip of speaker 'y/1', there are ['x/1', 'x/2', 'x/3', 'x/4']"),
        ([], ["x/0"], [], "no clip of speaker 'x/0', there are ['x/1', 'x/2', 'x/3', 'x/4']"),
        (["x/1"], None, ["x/1"], "speaker 'x/1' is in validation and in test, choose one"),
        (["x/1"], ["x/2"], ["x/2"], "speaker 'x/2' is in calibration and in test, choose one"),
    ],
)
def test_unknown_and_doubly_used_speakers_are_refused(validation, calibration, test, message):
    with pytest.raises(CorpusError) as fault:
        split(FOUR, validation, calibration, test, calibration_clips=1)
    assert str(fault.value) == message


def test_a_class_without_a_train_clip_is_refused():
    clips = [*FOUR, clip("x", "2", "disgust")]
    with pytest.raises(CorpusError, match="no clip of 'disgust' in train, move a speaker"):
        split(clips, ["x/2"], test=[], calibration_clips=1)


def test_a_split_put_together_by_hand_is_checked_too():
    one, two, three = (clip("x", who) for who in "123")
    Split((one,), (two,), (one,), (three,))
    with pytest.raises(CorpusError, match="speaker 'x/1' is in train and in validation"):
        Split((one,), (replace(one, path=Path("b.flac")),), (), ())
    with pytest.raises(CorpusError, match="speaker 'x/1' is in train and in test"):
        Split((one,), (two,), (), (one,))
    with pytest.raises(CorpusError, match=r"calibration clips of \['x/3'\], allowed are clips of"):
        Split((one,), (two,), (three,), (three,))


def test_calibration_may_come_from_validation_speakers():
    parts = split(FOUR, ["x/2", "x/3"], ["x/3"], test=["x/4"], calibration_clips=4)
    assert speakers(parts.calibration) == {"x/3"}


def test_a_draw_is_even_over_corpora_and_labels():
    clips = [clip("big", "1", emotion, n) for emotion in ("anger", "fear") for n in range(50)]
    clips += [clip("small", "1", "anger", n) for n in range(2)]
    drawn = draw(clips, 14, seed=3)
    assert Counter((one.corpus, one.emotion) for one in drawn) == {
        ("big", "anger"): 6,
        ("big", "fear"): 6,
        ("small", "anger"): 2,
    }
    assert len(set(drawn)) == 14


def test_a_draw_repeats_for_its_seed_only():
    assert draw(FOUR, 6, seed=1) == draw(FOUR, 6, seed=1)
    assert len({draw(FOUR, 6, seed=seed) for seed in range(5)}) > 1


def test_a_draw_of_more_than_there_is_is_refused():
    with pytest.raises(CorpusError, match="17 clips asked for, there are 16; ask for fewer"):
        draw(FOUR, 17, seed=0)


def test_pooled_clips_hold_no_recording_twice():
    clips = [clip("emodb", "03"), clip("emodb_2s", "03"), clip("nemo", "KS0")]
    assert [one.corpus for one in pooled(clips)] == ["emodb_2s", "nemo"]


@given(
    groups=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("fm")), min_size=2),
    k=st.integers(2, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_folds_are_disjoint_and_balanced(groups, k, seed):
    clips = [
        clip(corpus, str(number), number=take, gender=gender)
        for number, (corpus, gender) in enumerate(groups)
        for take in range(2)
    ]
    if k > len(groups):
        with pytest.raises(CorpusError, match=f"{k} folds, allowed are 2 to {len(groups)}"):
            folds(clips, k, seed)
        return
    fold = folds(clips, k, seed)
    np.testing.assert_array_equal(fold[::2], fold[1::2])
    kinds = [lambda one: "all", lambda one: one.corpus, lambda one: (one.corpus, one.gender)]
    for kind in kinds:
        for value in {kind(one) for one in clips}:
            counts = [
                len(
                    {
                        c.speaker
                        for c, f in zip(clips, fold, strict=True)
                        if f == i and kind(c) == value
                    }
                )
                for i in range(k)
            ]
            assert max(counts) - min(counts) <= 1


def test_folds_depend_on_the_seed_and_not_on_the_order():
    clips = [clip("x", str(who)) for who in range(12)]
    fold = folds(clips, 3, seed=5)
    np.testing.assert_array_equal(fold, folds(clips, 3, seed=5))
    np.testing.assert_array_equal(fold[::-1], folds(clips[::-1], 3, seed=5))
    assert any(not np.array_equal(fold, folds(clips, 3, seed=seed)) for seed in range(5))


def test_one_fold_is_refused():
    with pytest.raises(CorpusError, match="1 folds, allowed are 2 to 4, the number of speakers"):
        folds(FOUR, 1, seed=0)


def test_out_of_fold_probs_align_with_the_clips():
    calls = []

    def fit_predict(train, held_out):
        assert not speakers(train) & speakers(held_out)
        assert len(train) + len(held_out) == len(FOUR)
        calls.append(held_out)
        return [[FOUR.index(one), len(calls)] for one in held_out]

    probs = out_of_fold(FOUR, 2, 0, fit_predict)
    np.testing.assert_array_equal(probs[:, 0], np.arange(len(FOUR)))
    np.testing.assert_array_equal(probs[:, 1] - 1, folds(FOUR, 2, 0))
    assert sorted(map(FOUR.index, (*calls[0], *calls[1]))) == list(range(len(FOUR)))


@pytest.mark.parametrize(
    "answer",
    [
        lambda held_out: np.ones((len(held_out) - 1, 2)),
        lambda held_out: np.ones(len(held_out)),
        lambda held_out: np.full((len(held_out), 2), np.nan),
    ],
)
def test_out_of_fold_refuses_probs_that_do_not_answer_each_clip(answer):
    with pytest.raises(CorpusError, match="allowed are 8 rows of finite numbers, one a clip"):
        out_of_fold(FOUR, 2, 0, lambda train, held_out: answer(held_out))


def test_out_of_fold_refuses_a_label_that_only_the_held_out_speaker_has():
    clips = [*FOUR, clip("x", "2", "disgust")]
    with pytest.raises(CorpusError, match="no clip of 'disgust' in the train clips of fold"):
        out_of_fold(clips, 4, 0, lambda train, held_out: np.ones((len(held_out), 3)))


@pytest.mark.corpora
def test_the_real_corpora_split_by_the_design():
    if "EDGE_SER_CORPORA" not in os.environ:
        pytest.skip("EDGE_SER_CORPORA does not name the folder of the real corpora")
    names = ["emodb", "emodb_2s", "ravdess", "urdu", "nemo", "turev"]
    labels = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
    clips = load_corpora(Path(os.environ["EDGE_SER_CORPORA"]), names)
    clips = select(clips, labels, {"calm": "neutral"}).clips
    parts = split(clips, ["ravdess/14", "ravdess/15", "emodb/15", "nemo/SM0", "turev/7895"])
    assert speakers(parts.test) == set(TEST_SPEAKERS)
    assert {one.emotion for one in pooled(parts.test)} == set(labels)
    assert len({(one.corpus, one.emotion) for one in parts.calibration}) == 4 + 6 + 7 + 4 + 6 + 4
    fold = folds(clips, 5, 0)
    for number in range(5):
        held_out = [one for one, where in zip(clips, fold, strict=True) if where == number]
        assert {one.family for one in held_out} == {"emodb", "ravdess", "urdu", "nemo", "turev"}
