import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from edge_ser.errors import EdgeSerError
from export.frontend import LogMel, mel_filterbank

RATE_HZ = 16000


def noise(samples, seed=0, level=0.1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(samples)).astype(np.float32)


def sine(hz, samples=RATE_HZ):
    return np.sin(2 * np.pi * hz * np.arange(samples) / RATE_HZ).astype(np.float32)


def log_mel(samples, bins=80, **settings):
    with torch.no_grad():
        return LogMel(bins, **settings)(torch.from_numpy(samples)[None])[0].numpy()


def slaney(bins, n_fft=400, low_hz=0.0, high_hz=8000.0, rate_hz=RATE_HZ):
    lines = n_fft // 2 + 1
    return mel_filter_bank(lines, bins, low_hz, high_hz, rate_hz, "slaney", "slaney").T


@pytest.mark.parametrize(("bins", "n_fft"), [(80, 400), (64, 400), (40, 512), (20, 256)])
def test_the_filters_are_those_of_transformers(bins, n_fft):
    filters = mel_filterbank(bins, n_fft, RATE_HZ)
    assert filters.dtype == np.float32
    assert filters.shape == (bins, n_fft // 2 + 1)
    np.testing.assert_allclose(filters, slaney(bins, n_fft), rtol=1e-5, atol=1e-9)


def test_the_filters_keep_to_their_edges():
    filters = mel_filterbank(20, 512, 8000, low_hz=300.0, high_hz=3400.0)
    expected = slaney(20, 512, 300.0, 3400.0, 8000)
    np.testing.assert_allclose(filters, expected, rtol=1e-5, atol=1e-9)
    hz = np.linspace(0, 4000, 257)
    assert not filters[:, (hz <= 300) | (hz >= 3400)].any()


def test_bands_without_a_dft_bin_are_refused():
    with pytest.raises(EdgeSerError) as fault:
        mel_filterbank(80, 128, RATE_HZ)
    assert str(fault.value) == (
        "80 mel bands leave some band without a DFT bin at n_fft=128; use fewer bands"
    )


@pytest.mark.parametrize("samples", [16000, 6400, 6401, 6559, 6560, 20011])
def test_log_mel_is_that_of_whisper(samples):
    heard = noise(samples, seed=samples)
    extractor = WhisperFeatureExtractor(feature_size=80)
    expected = extractor(heard, sampling_rate=RATE_HZ, padding=False, return_tensors="np")
    found = (log_mel(heard) + 4) / 4
    assert found.shape == (80, samples // 160)
    np.testing.assert_allclose(found, expected["input_features"][0], atol=2e-5)


def test_log_mel_is_the_power_that_numpy_finds():
    heard = noise(4003).astype(np.float64)
    padded = np.pad(heard, 256, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.stack([padded[k * 128 : k * 128 + 512] * hann for k in range(4003 // 128)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    expected = np.log10(slaney(40, 512) @ power.T)
    found = log_mel(heard.astype(np.float32), 40, n_fft=512, hop=128)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_floor_lies_80_db_below_the_loudest_point():
    heard = np.concatenate([sine(1000, 8000), np.zeros(8000, np.float32)])
    found = log_mel(heard)
    assert found.min() == pytest.approx(found.max() - 8, abs=1e-5)
    assert (found[:, -10:] == found.min()).all()
    assert log_mel(heard, range_db=30.0).min() == pytest.approx(found.max() - 3, abs=1e-5)


def test_the_maximum_is_of_the_windows_own_frames():
    loud, soft = sine(1000), noise(RATE_HZ, level=1e-5)
    with torch.no_grad():
        both = LogMel(80)(torch.from_numpy(np.stack([loud, soft]))).numpy()
    np.testing.assert_allclose(both[0], log_mel(loud), atol=1e-5)
    np.testing.assert_allclose(both[1], log_mel(soft), atol=1e-5)
    assert both[1].max() < both[0].max() - 8  # one floor for both would have hidden the soft one


@pytest.mark.parametrize("hz", [200, 440, 1000, 2520, 6000])
def test_a_sine_is_loudest_in_its_band(hz):
    found = log_mel(sine(hz))[:, 10:-10]
    assert set(found.argmax(axis=0)) == {slaney(80)[:, round(hz * 400 / RATE_HZ)].argmax()}


def test_twice_as_loud_is_four_times_the_power():
    heard = noise(8000)
    np.testing.assert_allclose(log_mel(2 * heard) - log_mel(heard), np.log10(4), atol=1e-4)


def test_silence_is_the_smallest_number_and_finite():
    np.testing.assert_array_equal(log_mel(np.zeros(RATE_HZ, np.float32)), np.float32(-10))
