import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from export.calibration import (
    COVERAGES,
    error_if_calibrated,
    expected_calibration_error,
    nll,
    reliability,
    risk_coverage,
)


def test_calibration_error_of_a_case_counted_by_hand():
    # Two bins: in (0, 0.5] one clip, 0.5 sure and right; above three, of which two are right.
    probs = np.array([[0.5, 0.5], [0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
    true = np.array([0, 0, 0, 0])
    expected = 1 / 4 * abs(1 - 0.5) + 3 / 4 * abs(2 / 3 - 0.75)
    assert expected_calibration_error(probs, true, bins=2) == pytest.approx(expected)


def test_calibration_error_counts_the_upper_edge_of_a_bin_inside():
    # Confidence 0.5 belongs to (0.25, 0.5]: apart from 0.6, so the gaps do not cancel.
    probs = np.array([[0.5, 0.5], [0.4, 0.6]])
    gaps = abs(1 - 0.5) / 2 + abs(0 - 0.6) / 2
    assert expected_calibration_error(probs, np.array([0, 0]), bins=4) == pytest.approx(gaps)


def test_calibration_error_of_the_perfectly_and_the_falsely_sure():
    probs = np.array([[1.0, 0.0], [0.0, 1.0000001]])
    assert expected_calibration_error(probs, np.array([0, 1])) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(probs, np.array([1, 0])) == pytest.approx(1, abs=1e-6)


def test_a_confidence_a_little_over_one_is_in_the_last_bin():
    probs = np.array([[0.95, 0.05], [1.0000001, 0.0]])
    gap = abs((1 - 0.95) + (0 - 1)) / 2
    assert expected_calibration_error(probs, np.array([0, 1])) == pytest.approx(gap)


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(7), 500)
    true = rng.integers(7, size=500)
    confidence, right = probs.max(1), probs.argmax(1) == true
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(probs, true) == pytest.approx(expected)


def test_a_calibrated_model_shows_the_binomials_deviation_in_each_bin():
    # 60 clips that are .7 sure in one bin, 40 that are .95 sure in another.
    top = np.repeat([0.7, 0.95], [60, 40])
    found = error_if_calibrated(np.stack([top, 1 - top], axis=1), bins=10, draws=40_000)
    deviations = []
    for clips, sure in ((60, 0.7), (40, 0.95)):
        wins = np.arange(clips + 1)
        odds = binom.pmf(wins, clips, sure)
        deviations.append((np.abs(wins - clips * sure) / 100, odds))
    (first, odds), (second, others) = deviations
    assert found["mean"] == pytest.approx(first @ odds + second @ others, rel=0.01)
    sums, joint = np.add.outer(first, second).ravel(), np.outer(odds, others).ravel()
    order = np.argsort(sums)
    reached = joint[order].cumsum()
    assert found["high"] == pytest.approx(sums[order][np.searchsorted(reached, 0.95)], abs=0.004)


def test_calibrated_by_draws_is_what_calibration_error_says_of_such_answers():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(7) / 2, 300)
    errors = []
    for _ in range(300):
        right = rng.random(300) < probs.max(axis=1)
        said = probs.argmax(axis=1)
        errors.append(expected_calibration_error(probs, np.where(right, said, (said + 1) % 7)))
    assert error_if_calibrated(probs)["mean"] == pytest.approx(np.mean(errors), rel=0.03)


def test_nll_equals_scikit_learn_and_stays_finite():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 50)
    true = rng.integers(4, size=50)
    assert nll(probs, true) == pytest.approx(reference.log_loss(true, probs, labels=range(4)))
    assert nll(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-np.log(1e-12))


def test_reliability_equals_scikit_learn_for_two_classes():
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1.0, 300)
    probs, true = np.stack([1 - sure, sure], axis=1), rng.integers(2, size=300)
    found = reliability(probs, true, bins=10)
    accuracy, confidence = calibration_curve(true, sure, n_bins=10)
    np.testing.assert_allclose([b.accuracy for b in found], accuracy)
    np.testing.assert_allclose([b.confidence for b in found], confidence)
    assert sum(b.clips for b in found) == 300


def test_risk_falls_where_the_surest_answers_are_right():
    sure = np.linspace(0.5, 0.95, 10)  # the least sure five are wrong
    probs = np.stack([sure, 1 - sure], axis=1)
    true = np.array([1] * 5 + [0] * 5)
    found = risk_coverage(probs, true)
    assert list(found) == [f"{share:.1f}" for share in COVERAGES]
    assert [found[f"{share:.1f}"] for share in (0.1, 0.5, 0.6, 1.0)] == [0, 0, 1 / 6, 0.5]


@given(st.integers(1, 40), st.integers(0, 99))
def test_risk_at_full_coverage_is_the_error(clips, seed):
    rng = np.random.default_rng(seed)
    probs, true = rng.dirichlet(np.ones(3), clips), rng.integers(3, size=clips)
    found = risk_coverage(probs, true)
    assert found["1.0"] == pytest.approx((probs.argmax(axis=1) != true).mean())
    surest = probs.max(axis=1).argmax()
    if clips <= 10:
        assert found["0.1"] == float(probs[surest].argmax() != true[surest])
