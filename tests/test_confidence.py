import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from export.confidence import TEMPERATURES, abstain_threshold, clip_probs, fit_temperature

seeds = st.integers(0, 2**32 - 1)


def drawn(clips, temperature, seed=0, labels=4):
    """Logits (1, C) and classes drawn with the probs that the temperature makes of them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (clips, labels))
    chance = rng.random((clips, 1))
    true = (softmax(logits / temperature, axis=1).cumsum(axis=1) < chance).sum(axis=1)
    return list(logits[:, None]), np.minimum(true, labels - 1)


def two_label_probs(confidence):
    return np.column_stack([confidence, 1 - np.array(confidence)])


def test_the_probs_of_a_clip_are_the_mean_over_its_windows():
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(windows, 3)).astype(np.float32) for windows in (2, 1, 5)]
    expected = [softmax(w.astype(float) / 1.7, axis=1).mean(axis=0) for w in logits]
    np.testing.assert_allclose(clip_probs(logits, 1.7), expected)
    np.testing.assert_allclose(clip_probs(logits[:1]), [softmax(logits[0], axis=1).mean(axis=0)])


def test_the_temperature_of_a_case_counted_by_hand():
    # Of four clips with logits (2, 0), three are right: p = 3/4 = 1 / (1 + exp(-2 / T)).
    logits = [np.array([[2.0, 0.0]])] * 4
    found = fit_temperature(logits, np.array([0, 0, 0, 1]))
    assert found == pytest.approx(2 / np.log(3), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_truth_is_found(temperature):
    logits, true = drawn(20000, temperature)
    assert fit_temperature(logits, true) == pytest.approx(temperature, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0.25, 4))
def test_logits_times_k_need_a_temperature_times_k(seed, factor):
    logits, true = drawn(200, 1.0, seed)
    logits = [np.concatenate([one, other]) for one, other in zip(logits, logits[::-1], strict=True)]
    once = fit_temperature(logits, true)
    lowest, highest = TEMPERATURES
    assume(lowest * 1.1 < once < highest / 1.1 and lowest * 1.1 < once * factor < highest / 1.1)
    scaled = fit_temperature([factor * one for one in logits], true)
    assert scaled == pytest.approx(factor * once, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-5, 5))
def test_no_temperature_nearby_is_likelier_and_a_shift_of_all_logits_changes_nothing(seed, shift):
    logits, true = drawn(60, 2.0, seed)

    def nll(temperature):
        rows = softmax(np.concatenate(logits) / temperature, axis=1)
        return -np.log(rows[np.arange(len(true)), true]).sum()

    found = fit_temperature(logits, true)
    for factor in (0.9, 1.1):
        nearby = float(np.clip(found * factor, *TEMPERATURES))
        assert nll(found) <= nll(nearby) + 1e-4
    assert fit_temperature([one + shift for one in logits], true) == pytest.approx(found, rel=1e-3)


def test_answers_that_are_all_right_or_all_wrong_stop_at_the_ends():
    logits = [np.array([[3.0, 0.0]])] * 5
    low, high = TEMPERATURES
    assert fit_temperature(logits, np.zeros(5, int)) < 2 * low
    assert fit_temperature(logits, np.ones(5, int)) == pytest.approx(high, rel=1e-3)


def test_the_threshold_of_a_case_counted_by_hand():
    confidence = [0.5, 0.6, 0.7, 0.8, 0.9]
    #             wrong right wrong right right; below 0.9 two of four are right, below 1.0 three
    true = np.array([1, 0, 1, 0, 0])
    assert abstain_threshold(two_label_probs(confidence), true) == 0.9


def test_a_threshold_may_lie_above_one_that_fails():
    # Below 0.6 all are right, below 0.8 one of three.
    probs = two_label_probs([0.55, 0.6, 0.7, 0.8, 0.9])
    assert abstain_threshold(probs, np.array([0, 1, 1, 0, 0])) == 0.9
    assert abstain_threshold(probs, np.array([0, 1, 0, 0, 0])) == 0.7


def test_equal_confidences_are_doubted_together():
    probs = two_label_probs([0.6, 0.6, 0.6, 0.9])
    assert abstain_threshold(probs, np.array([1, 0, 0, 0])) == 0.0
    assert abstain_threshold(probs, np.array([1, 1, 0, 0])) == 1.0  # two of four
    assert abstain_threshold(probs[:, ::-1], np.array([0, 1, 1, 1])) == 0.0  # any label


def test_no_answer_is_uncertain_where_all_are_right_and_every_one_where_none_is():
    probs = two_label_probs([0.6, 0.8])
    assert abstain_threshold(probs, np.array([0, 0])) == 0.0
    assert abstain_threshold(probs, np.array([1, 1])) == 1.0


@given(st.lists(st.tuples(st.sampled_from(np.linspace(0.5, 1, 11)), st.booleans()), min_size=1))
def test_the_threshold_is_the_largest_that_fits(answers):
    confidence = np.array([pair[0] for pair in answers])
    right = np.array([pair[1] for pair in answers])
    # Label 0 is the answer, also of the clips with 0.5 for both.
    found = abstain_threshold(two_label_probs(confidence), np.where(right, 0, 1))

    def fits(threshold):
        below = right[confidence < threshold]
        return len(below) > 0 and below.mean() <= 0.5

    assert found == 0.0 or fits(found)
    assert not any(fits(t) for t in (*confidence, 1.0) if t > found)
