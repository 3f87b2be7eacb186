import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from edge_ser import Recognizer, timing
from edge_ser.bundle import Bundle
from edge_ser.testing import FakeEngine, make_bundle

latencies = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=300)


def test_a_percentile_is_the_nearest_rank():
    samples_ms = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [timing.percentile(samples_ms, p) for p in (1, 20, 50, 90, 100)] == [1, 1, 3, 5, 5]


@given(latencies, st.sampled_from([50, 90, 99]))
def test_percentiles_equal_numpys_inverted_cdf(samples_ms, percent):
    expected = np.percentile(samples_ms, percent, method="inverted_cdf")
    assert timing.percentile(samples_ms, percent) == expected


@pytest.mark.parametrize(("percent", "needed"), [(90, 64), (99, 662)])
def test_early_stopping_needs_as_many_samples_as_mlperf_says(percent, needed):
    samples_ms = [float(i) for i in range(needed)]
    assert timing.early_stopping(samples_ms[:-1], percent) is None
    assert timing.early_stopping(samples_ms, percent) == needed - 1  # the slowest of all


@given(st.integers(1, 3000), st.sampled_from([90, 99]))
def test_early_stopping_drops_as_many_samples_as_the_binomial_allows(n, percent):
    t = int((binom.cdf(np.arange(n), n, 1 - percent / 100) <= 0.01).sum()) - 1
    expected = n - (t - 1) if t >= 1 else None  # of 1, 2, ... n without the t - 1 slowest
    assert timing.early_stopping([float(i + 1) for i in range(n)], percent) == expected


def test_summary_of_a_hundred_latencies():
    assert timing.summary([float(i) for i in range(1, 101)]) == {
        "p50_ms": 50.0,
        "p90_ms": 90.0,
        "p99_ms": 99.0,
        "p90_early_stopping_ms": 98.0,  # P(X <= 3 of 100 at 0.1) = 0.8 %, P(X <= 4) = 2.4 %
        "p99_early_stopping_ms": None,
    }


def test_measure_gives_the_engine_the_windows_that_predict_runs(tmp_path):
    engine = FakeEngine([0.0, 0.0, 0.0])
    metadata = Bundle.open(make_bundle(tmp_path)).metadata
    times_ms = timing.measure(Recognizer(metadata, engine), seconds=4.0, runs=2)
    assert {name: len(values) for name, values in times_ms.items()} == {
        "end_to_end": 2,
        "engine": 2,
    }
    through_predict, alone = engine.calls[0:2], engine.calls[2:4]  # 4 s are two windows
    assert len(engine.calls) == 4 * (timing.WARM_UP + 2)
    assert all(map(np.array_equal, through_predict, alone))


def test_peak_memory_counts_an_array_that_was_filled():
    before = timing.peak_memory_mb()
    array = np.ones(int((before + 50) * 1e6), np.uint8)
    assert timing.peak_memory_mb() >= array.nbytes / 1e6
