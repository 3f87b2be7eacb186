import numpy as np
import pytest

from export.robustness import LARGE, LOST, SMALL, SNR_DB, TILT_DB, table

RATE_HZ = 16000


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return (0.1 * rng.standard_normal(RATE_HZ)).astype(np.float32)


def rng():
    return np.random.default_rng(1)


def power_db(samples):
    return 10 * np.log10(np.square(samples, dtype=np.float64).mean())


def test_there_are_ten_small_changes():
    assert len(SMALL) == 10
    assert {kind for kind, _ in LARGE.values()} == set(LOST)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_change_is_small_and_leaves_the_recording_as_it_was(samples, name):
    before = samples.copy()
    changed = SMALL[name](samples, rng())
    np.testing.assert_array_equal(samples, before)
    assert changed.dtype == np.float32
    assert 0 < len(changed) - len(samples) + 1001 < 2002
    assert changed.shape != samples.shape or not np.array_equal(changed, samples)
    again = SMALL[name](samples, rng())
    np.testing.assert_array_equal(changed, again)


@pytest.mark.parametrize("name", ["white noise", "music", "babble"])
def test_speech_is_20_db_above_what_is_added(samples, name):
    change = LARGE[name][1]
    more = {}
    if name == "babble":
        others = [np.roll(samples, shift)[: 3000 * shift] for shift in range(1, 8)]
        more = {"others": others}
    added = change(samples, rng(), **more).astype(np.float64) - samples
    assert power_db(samples) - power_db(added) == pytest.approx(SNR_DB, abs=0.01)


@pytest.mark.parametrize(("name", "db"), [("tilt up", TILT_DB), ("tilt down", -TILT_DB)])
def test_a_tilt_is_so_many_db_an_octave(samples, name, db):
    tilted = LARGE[name][1](samples, rng())
    gain_db = 20 * np.log10(np.abs(np.fft.rfft(tilted) / np.fft.rfft(samples)))
    assert gain_db[4000] - gain_db[2000] == pytest.approx(db, abs=0.01)


def test_a_filter_cuts_its_side(samples):
    power = {
        name: np.abs(np.fft.rfft(SMALL[name](samples, rng()))) / np.abs(np.fft.rfft(samples))
        for name in ("high-pass", "low-pass")
    }
    assert power["high-pass"][5:20].mean() < 0.5 < power["low-pass"][5:20].mean()
    assert power["low-pass"][7800:].mean() < 0.5 < power["high-pass"][7800:].mean()


def test_peaks_are_cut_at_full_scale(samples):
    clipped = SMALL["clipping"](samples, rng())
    assert np.abs(clipped).max() == 1
    assert 0.001 <= (np.abs(clipped) == 1).mean() <= 0.0031


def test_a_miss_is_marked():
    names = (*SMALL, *LARGE)
    cell = {"mean": 1.0, "sd": None}
    summary = {
        "command": "c", "clips": 3, "pooled_ua": cell,
        "unchanged": dict.fromkeys(names, cell), "ua_change": dict.fromkeys(names, cell),
    }  # fmt: skip
    assert "missed" not in table(summary)
    summary["unchanged"]["tone"] = {"mean": 0.94, "sd": 0.01}
    summary["ua_change"]["tilt up"] = {"mean": -0.021, "sd": None}
    summary["ua_change"]["babble"] = {"mean": -0.05, "sd": None}
    lines = [line for line in table(summary).splitlines() if "missed" in line]
    assert lines == [
        "| tone | 0.940 ± 0.010 | +1.000 | 0.95 equal: missed |",
        "| tilt up | 1.000 | -0.021 | -0.02 UA: missed |",
    ]
