import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ser.bundle import Bundle
from edge_ser.testing import make_bundle
from export.augment import Augmentation
from export.certify import doubts
from export.nonspeech import KINDS, sound
from export.recipe import Windows
from export.targets import smoothed
from export.views import Cutting, load_views, make_sound_views

RATE = 16_000


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**7), st.floats(0.4, 4.0))
def test_a_sound_is_finite_not_clipped_and_depends_on_its_seed_alone(kind, seed, seconds):
    samples = sound(kind, seed, seconds, RATE)
    assert samples.dtype == np.float32
    assert len(samples) == round(seconds * RATE)
    assert np.abs(samples).max() <= 0.4
    np.testing.assert_array_equal(samples, sound(kind, seed, seconds, RATE))


def spectrum(samples):
    return np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(len(samples), 1 / RATE)


@pytest.mark.parametrize("seed", range(5))
def test_hum_lies_on_multiples_of_the_mains(seed):
    power, hz = spectrum(sound("hum", seed, 2.0, RATE))
    strongest = hz[power.argmax()]
    assert min(strongest % 50, -strongest % 50, strongest % 60, -strongest % 60) < 1


@pytest.mark.parametrize("seed", range(5))
def test_music_is_of_few_tones_and_noise_is_not(seed):
    shares = {}
    for kind in ("music", "noise"):
        power, hz = spectrum(sound(kind, seed, 4.0, RATE))
        power = np.sort(power[hz > 200])[::-1]
        shares[kind] = power[: len(power) // 50].sum() / power.sum()
    assert shares["music"] > 0.5
    assert shares["noise"] < shares["music"]


def test_silence_is_zero_or_a_bit_or_two():
    loudest = [np.abs(sound("silence", seed, 1.0, RATE)).max() * 2**15 for seed in range(20)]
    assert min(loudest) == 0
    assert 1 <= max(loudest) <= 12


def test_what_is_no_speech_is_taught_as_any_label():
    found = smoothed(torch.tensor([1, -1]), torch.ones(2, 4, dtype=torch.bool), 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.25] * 4]))


def test_sounds_are_cached_behind_the_clips(tmp_path):
    cutting = Cutting(RATE, Windows(1.0, 0.5), Augmentation())
    make_sound_views(tmp_path, 7, 8, cutting, lambda samples: {"states": samples[:5]})
    views = load_views(tmp_path)
    assert sorted(view.clip for view in views) == list(range(7, 15))
    assert {view.number for view in views} == {0}
    music = next(view for view in views if view.clip == 8)
    seconds = np.random.default_rng(1).uniform(0.5, 1.0)
    np.testing.assert_array_equal(music.arrays["states"], sound("music", 1, seconds, RATE)[:5])


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_share_that_is_uncertain_is_that_below_the_threshold(tmp_path, threshold, expected):
    folder = make_bundle(tmp_path / "b", abstain_below=threshold, temperature=9.0)
    found = doubts(Bundle.open(folder).metadata, folder / "model_int8.onnx")
    assert found["minutes"] == 10
    assert found["uncertain"] == expected
    assert found["by_kind"] == dict.fromkeys(KINDS, expected)
    assert 1 / 3 < found["confidence"] < 1
