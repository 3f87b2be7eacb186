import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap
from sklearn import metrics as reference

from export.metrics import (
    McNemar,
    confusion,
    f1,
    macro_f1,
    masked_argmax,
    mcnemar,
    recalls,
    ua,
    ua_difference,
    ua_interval,
    ua_plus_wa,
    wa,
)

TRUE = np.array([0, 0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 0, 1, 1, 2, 2])
# Recalls 3/4, 1/2, 1/1. Class 3 neither occurs nor is predicted.
MATRIX = confusion(TRUE, PREDICTED, 4)

answers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60).map(
    lambda pairs: np.array(pairs).T
)


def test_confusion_has_truth_in_rows():
    expected = [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(MATRIX, expected)


def test_scores_of_a_case_counted_by_hand():
    np.testing.assert_array_equal(recalls(MATRIX), [0.75, 0.5, 1.0, np.nan])
    assert ua(MATRIX) == 0.75
    assert wa(MATRIX) == 5 / 7
    assert ua_plus_wa(MATRIX) == 0.75 + 5 / 7
    np.testing.assert_allclose(f1(MATRIX), [6 / 7, 1 / 2, 2 / 3, np.nan])
    assert macro_f1(MATRIX) == pytest.approx((6 / 7 + 1 / 2 + 2 / 3) / 3)


def test_a_class_that_is_predicted_only_has_f1_zero_and_counts_in_no_mean():
    matrix = confusion(np.array([0, 0]), np.array([0, 1]), 3)
    np.testing.assert_allclose(f1(matrix), [2 / 3, 0, np.nan])
    assert macro_f1(matrix) == pytest.approx(2 / 3)
    assert ua(matrix) == 0.5


def test_scores_of_nothing_are_nan():
    assert np.isnan([ua(np.zeros((3, 3))), wa(np.zeros((3, 3))), macro_f1(np.zeros((3, 3)))]).all()


@given(answers)
def test_scores_equal_scikit_learn(pairs):
    true, predicted = pairs
    matrix = confusion(true, predicted, 5)
    occurring = np.unique(true)
    kwargs = {"labels": occurring, "zero_division": 0.0}
    np.testing.assert_array_equal(
        matrix, reference.confusion_matrix(true, predicted, labels=range(5))
    )
    np.testing.assert_allclose(
        recalls(matrix)[occurring], reference.recall_score(true, predicted, average=None, **kwargs)
    )
    assert ua(matrix) == pytest.approx(
        reference.recall_score(true, predicted, average="macro", **kwargs)
    )
    assert wa(matrix) == pytest.approx(reference.accuracy_score(true, predicted))
    np.testing.assert_allclose(
        f1(matrix)[occurring], reference.f1_score(true, predicted, average=None, **kwargs)
    )
    assert macro_f1(matrix) == pytest.approx(
        reference.f1_score(true, predicted, average="macro", **kwargs)
    )


def test_ua_is_balanced_accuracy():
    assert ua(MATRIX) == reference.balanced_accuracy_score(TRUE, [0, 0, 0, 1, 1, 2, 2])


@given(answers, st.integers(2, 5), st.integers(0, 4))
def test_ua_does_not_change_when_a_class_is_heard_more_often(pairs, times, label):
    true, predicted = pairs
    again = np.where(true == label, times, 1)
    more = confusion(true.repeat(again), predicted.repeat(again), 5)
    assert ua(more) == pytest.approx(ua(confusion(true, predicted, 5)))


@given(answers)
def test_scores_of_many_matrices_are_those_of_each(pairs):
    one = confusion(*pairs, 5)
    both = np.stack([one, one.T])
    for score in (recalls, ua, wa, f1, macro_f1, ua_plus_wa):
        np.testing.assert_array_equal(score(both), np.stack([score(one), score(one.T)]))


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        ([0, 1], [0], r"shapes \(2,\) and \(1,\), needed are \(N,\) and \(N,\)"),
        ([0, 3], [0, 1], "classes 0 to 3, allowed are 0 to 2"),
        ([0, 1], [-1, 1], "classes -1 to 1, allowed are 0 to 2"),
    ],
)
def test_confusion_refuses_what_it_cannot_count(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        confusion(np.array(true), np.array(predicted), 3)


def test_a_masked_argmax_is_the_best_allowed_class():
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert masked_argmax(probs, np.array([False, True, True])).tolist() == [1, 2]
    each = np.array([[True, True, True], [True, False, False]])
    assert masked_argmax(probs, each).tolist() == [0, 0]
    with pytest.raises(ValueError, match="a mask without a class"):
        masked_argmax(probs, np.array([[True, True, True], [False, False, False]]))


def random_answers(count, right=0.7, seed=0):
    rng = np.random.default_rng(seed)
    true = rng.integers(4, size=count)
    return true, np.where(rng.random(count) < right, true, rng.integers(4, size=count))


def test_the_interval_over_clips_equals_scipys_percentile_bootstrap():
    true, predicted = random_answers(200)
    interval = ua_interval(
        true, predicted, 4, np.arange(200) % 4, np.full(200, "x"), resamples=20_000
    )
    expected = bootstrap(
        (true, predicted),
        lambda t, p, axis: (
            ua(np.stack([confusion(*rows, 4) for rows in zip(t, p, strict=True)]))
            if t.ndim > 1
            else ua(confusion(t, p, 4))
        ),
        paired=True,
        n_resamples=5_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert interval.unit == "clip"
    assert interval.value == ua(confusion(true, predicted, 4))
    assert interval.low == pytest.approx(expected.low, abs=0.005)
    assert interval.high == pytest.approx(expected.high, abs=0.005)


def test_the_interval_over_speakers_draws_whole_speakers():
    # Five speakers, all right or all wrong: UA of a resample is the part of right speakers, so it
    # is binomial(5, 3/5) / 5, and its 2.5 and 97.5 percentiles are 1/5 (P(0) is 1 %) and 1.
    speakers = np.repeat(list("abcde"), 40)
    true = np.zeros(200, int)
    predicted = np.repeat([0, 0, 0, 1, 1], 40)
    interval = ua_interval(true, predicted, 2, speakers, np.full(200, "x"))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.6, 0.2, 1.0))
    assert interval.unit == "speaker"
    by_clip = ua_interval(true, predicted, 2, np.full(200, "a"), np.full(200, "x"))
    assert by_clip.unit == "clip"
    assert by_clip.high - by_clip.low < 0.2


def test_each_corpus_keeps_its_number_of_draws():
    # One corpus is all right, the other all wrong: no resample can say anything but 10/40.
    corpora = np.repeat(["x", "y"], [10, 30])
    predicted = np.repeat([0, 1], [10, 30])
    speakers = np.concatenate([np.arange(10), np.zeros(30)])
    interval = ua_interval(np.zeros(40, int), predicted, 2, speakers, corpora)
    assert (interval.low, interval.value, interval.high) == (0.25, 0.25, 0.25)
    assert interval.unit == "speaker and clip"


def test_speakers_of_two_corpora_are_two_even_if_a_name_agrees():
    # Four speakers in each corpus: fewer than five, though eight by name.
    corpora = np.repeat(["x", "y"], 8)
    interval = ua_interval(*random_answers(16), 4, np.tile(np.arange(4), 4), corpora)
    assert interval.unit == "clip"


def test_a_class_that_a_resample_misses_is_left_out_of_its_mean():
    # The one clip of class 1 is missed by a third of the resamples; none of them is nan or 0.5.
    true = np.array([0, 0, 1])
    interval = ua_interval(true, true, 2, np.zeros(3), np.zeros(3))
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_an_interval_repeats_for_its_seed():
    true, predicted = random_answers(60)
    first, again, other = (
        ua_interval(true, predicted, 4, np.zeros(60), np.zeros(60), seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_difference_is_scored_on_the_same_resamples():
    true, predicted = random_answers(100)
    same = ua_difference(true, predicted, predicted, 4, np.zeros(100), np.zeros(100))
    assert (same.low, same.value, same.high) == (0, 0, 0)
    better = np.where(np.arange(100) < 30, true, predicted)
    difference = ua_difference(true, better, predicted, 4, np.zeros(100), np.zeros(100))
    gained = ua(confusion(true, better, 4)) - ua(confusion(true, predicted, 4))
    assert difference.value == pytest.approx(gained)
    assert 0 < difference.low < gained < difference.high
    back = ua_difference(true, predicted, better, 4, np.zeros(100), np.zeros(100))
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))
    one, two = (ua_interval(true, p, 4, np.zeros(100), np.zeros(100)) for p in (better, predicted))
    assert difference.high - difference.low < (one.high - one.low) + (two.high - two.low)


def test_mcnemar_of_a_case_counted_by_hand():
    # One clip is right for the first only, five for the second only:
    # 2 (C(6,0) + C(6,1)) / 2^6 = 14/64.
    true = np.zeros(9, int)
    first = np.array([0, 1, 1, 1, 1, 1, 0, 0, 1])
    second = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1])
    assert mcnemar(true, first, second) == McNemar(1, 5, pytest.approx(14 / 64))
    assert mcnemar(true, second, first) == McNemar(5, 1, pytest.approx(14 / 64))


def test_mcnemar_of_equals_is_certain():
    assert mcnemar(TRUE, PREDICTED, PREDICTED) == McNemar(0, 0, 1.0)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_equals_a_doubled_tail(first_only, second_only):
    true = np.zeros(first_only + second_only, int)
    first = np.repeat([0, 1], [first_only, second_only])
    result = mcnemar(true, first, 1 - first)
    decided = first_only + second_only
    tail = (
        binomtest(min(first_only, second_only), decided, alternative="less").pvalue
        if decided
        else 1.0
    )
    assert (result.first_only, result.second_only) == (first_only, second_only)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
