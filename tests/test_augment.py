from dataclasses import fields

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from export.augment import Augmentation, augment
from export.effects import (
    CODECS,
    add_noise,
    add_tone,
    at_level_of,
    clip_peaks,
    coded,
    gain,
    pitch_shift,
    room,
    shift,
    telephone,
    tilt,
    time_stretch,
)
from export.errors import CorpusError, RecipeError

RATE_HZ = 16000
NEVER = {field.name: 0.0 for field in fields(Augmentation) if not isinstance(field.default, tuple)}
ALWAYS = Augmentation(**dict.fromkeys(NEVER, 1.0))


def sine(hz, seconds=2.0, amplitude=0.5):
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (amplitude * np.sin(2 * np.pi * hz * time_s)).astype(np.float32)


def speech_like(seconds=1.5, seed=0):
    rng = np.random.default_rng(seed)
    envelope = np.sin(np.linspace(0, 9 * np.pi, round(seconds * RATE_HZ))) ** 2
    return (0.1 * envelope * rng.standard_normal(len(envelope))).astype(np.float32)


def rms(samples):
    return np.sqrt(np.mean(np.square(samples, dtype=np.float64)))


def db(ratio):
    return 20 * np.log10(ratio)


def peak_hz(samples):
    size = 8 * len(samples)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), size))
    return spectrum.argmax() * RATE_HZ / size


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("gain_db", [-20.0, 0.0, 6.0])
def test_gain_is_exact(gain_db):
    samples = np.array([0.5, -0.25, 0.0], np.float32)
    np.testing.assert_allclose(gain(samples, gain_db=gain_db), samples * 10 ** (gain_db / 20))
    assert gain(samples, gain_db=gain_db).dtype == np.float32


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 30.0])
def test_noise_meets_its_ratio_to_a_hundredth_of_a_db(snr_db, exponent):
    clean = speech_like()
    noisy = add_noise(clean, RATE_HZ, generator(), snr_db=snr_db, exponent=exponent)
    assert noisy.dtype == np.float32
    assert db(rms(clean) / rms(noisy - clean)) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_falls_with_its_exponent(exponent):
    # 10 lg 2 dB an octave and exponent, which is 3.01 dB for pink noise.
    clean = np.full(60 * RATE_HZ, 1e-3, np.float32)
    noise = add_noise(clean, RATE_HZ, generator(), snr_db=-60, exponent=exponent) - clean
    hz, power = scipy.signal.welch(noise, RATE_HZ, nperseg=1024)
    low, high = (power[(hz > f / 1.1) & (hz < f * 1.1)].mean() for f in (500, 4000))
    assert 10 * np.log10(low / high) == pytest.approx(3 * 3.01 * exponent, abs=0.5)


@pytest.mark.parametrize("speed", [0.5, 0.8, 0.97, 1.0, 1.03, 1.25, 2.0])
@pytest.mark.parametrize("length", [6400, 16001, 48000])
def test_a_stretch_has_its_exact_length(speed, length):
    out = time_stretch(speech_like(3.0)[:length], speed=speed)
    assert out.shape == (round(length / speed),)
    assert out.dtype == np.float32


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_a_stretch_keeps_the_pitch_and_the_level_of_a_tone(speed):
    tone = sine(440)
    out = time_stretch(tone, speed=speed)
    assert peak_hz(out) == pytest.approx(440, abs=0.5)
    assert db(rms(out) / rms(tone)) == pytest.approx(0, abs=1.0)


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_a_stretch_moves_events_in_time(speed):
    clicks = np.zeros(2 * RATE_HZ, np.float32)
    clicks[[8000, 24000]] = 1
    out = time_stretch(clicks, speed=speed)
    middle = len(out) // 2
    found = [np.abs(out[:middle]).argmax(), middle + np.abs(out[middle:]).argmax()]
    np.testing.assert_allclose(found, [8000 / speed, 24000 / speed], atol=256)


def test_a_stretch_by_one_changes_nothing():
    samples = speech_like()
    np.testing.assert_array_equal(time_stretch(samples, speed=1.0), samples)
    nearly = time_stretch(samples, speed=1 + 1 / (len(samples) - 1))
    np.testing.assert_allclose(nearly[512:2000], samples[512:2000], atol=0.02)


@pytest.mark.parametrize("semitones", [-12, -2, -0.5, 1, 3, 12])
def test_a_pitch_shift_moves_a_tone_by_its_ratio(semitones):
    tone = sine(500)
    out = pitch_shift(tone, semitones=semitones)
    assert out.shape == tone.shape
    assert out.dtype == np.float32
    assert peak_hz(out) == pytest.approx(500 * 2 ** (semitones / 12), rel=1e-3)


def test_a_pitch_shift_of_nothing_changes_nothing():
    np.testing.assert_array_equal(pitch_shift(speech_like(), semitones=0), speech_like())


def test_a_raised_tone_does_not_fold_back():
    assert rms(pitch_shift(sine(7000), semitones=6)[2000:-2000]) < 0.01 * rms(sine(7000))


def test_a_shift_moves_samples_and_fills_with_silence():
    samples = np.array([1, 2, 3, 4], np.float32)
    assert shift(samples, 4, shift_s=0.25).tolist() == [0, 1, 2, 3]
    assert shift(samples, 4, shift_s=-0.5).tolist() == [3, 4, 0, 0]
    assert shift(samples, 4, shift_s=0.0).tolist() == [1, 2, 3, 4]
    assert shift(samples, 4, shift_s=1.5).tolist() == [0, 0, 0, 0]
    assert shift(samples, 4, shift_s=9.0).tolist() == [0, 0, 0, 0]
    assert shift(samples, 4, shift_s=-9.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("hz", "lowest_db", "highest_db"),
    [(100, -60, -38), (300, -3.1, -2.9), (1000, -0.1, 0.1), (3400, -3.1, -2.9), (6000, -60, -38)],
)
def test_the_telephone_passes_its_band_only(hz, lowest_db, highest_db):
    tone = sine(hz)
    passed = telephone(tone, RATE_HZ)
    assert passed.dtype == np.float32
    assert lowest_db < db(rms(passed[8000:]) / rms(tone[8000:])) < highest_db


def test_a_room_decays_by_60_db_in_its_time():
    click = np.zeros(RATE_HZ, np.float32)
    click[0] = 1
    response = room(click, RATE_HZ, generator(), rt60_s=0.5, direct_db=6.0)
    assert response.dtype == np.float32
    assert response[0] == pytest.approx(1, abs=1e-5)
    tail = response[1:]
    assert -10 * np.log10(np.sum(tail.astype(float) ** 2)) == pytest.approx(6, abs=0.01)
    early, late = rms(tail[:800]), rms(tail[4000:4800])
    assert db(early / late) == pytest.approx(60 * 0.25 / 0.5, abs=1.0)
    np.testing.assert_allclose(tail[8000:], 0, atol=1e-6)


def test_a_room_longer_than_the_clip_keeps_its_ratio():
    click = np.zeros(6400, np.float32)
    click[0] = 1
    tail = room(click, RATE_HZ, generator(), rt60_s=2.0, direct_db=0.0)[1:]
    assert np.sum(tail.astype(float) ** 2) == pytest.approx(1, abs=1e-3)


def test_a_level_is_matched_and_silence_stays():
    loud, soft = sine(440), sine(300, amplitude=0.01)
    assert rms(at_level_of(loud, soft)) == pytest.approx(rms(loud), rel=1e-5)
    np.testing.assert_array_equal(at_level_of(loud, np.zeros(9, np.float32)), np.zeros(9))


@pytest.mark.parametrize("name", ["stretch", "pitch", "room", "tilt", "clipping", "telephone"])
def test_augment_keeps_the_level_but_for_noise_and_gain(name):
    samples = speech_like()
    out = augment(samples, RATE_HZ, generator(), Augmentation(**{**NEVER, name: 1.0}))
    assert not np.array_equal(out, samples)
    assert rms(out) == pytest.approx(rms(samples), rel=1e-4)


def test_augment_applies_a_gain_last_and_exactly():
    recipe = Augmentation(**{**NEVER, "gain": 1.0}, gain_db=(-6.0, -6.0))
    np.testing.assert_allclose(
        augment(speech_like(), RATE_HZ, generator(), recipe), speech_like() * 10 ** (-6 / 20)
    )


def test_augment_adds_noise_at_its_ratio():
    recipe = Augmentation(**{**NEVER, "noise": 1.0}, snr_db=(10.0, 10.0))
    noise = augment(speech_like(), RATE_HZ, generator(), recipe) - speech_like()
    assert db(rms(speech_like()) / rms(noise)) == pytest.approx(10, abs=0.01)


def test_augment_adds_a_tone_at_its_ratio():
    recipe = Augmentation(**{**NEVER, "tone": 1.0}, snr_db=(20.0, 20.0), tone_hz=(1000, 1000))
    tone = augment(speech_like(), RATE_HZ, generator(), recipe) - speech_like()
    assert db(rms(speech_like()) / rms(tone)) == pytest.approx(20, abs=0.01)
    assert peak_hz(tone) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("slope_db", [-3.0, 3.0])
def test_a_tilt_is_so_many_db_an_octave_at_the_level_of_before(slope_db):
    samples = generator().normal(0, 0.1, 3 * RATE_HZ).astype(np.float32)
    tilted = tilt(samples, RATE_HZ, db=slope_db)
    assert rms(tilted) == pytest.approx(rms(samples), rel=1e-4)
    gains_db = db(np.abs(np.fft.rfft(tilted) / np.fft.rfft(samples)))
    at_hz = dict(zip((100, 400, 2000, 4000), gains_db[[300, 1200, 6000, 12000]], strict=True))
    assert at_hz[4000] - at_hz[2000] == pytest.approx(slope_db, abs=0.01)
    assert at_hz[400] - at_hz[100] == pytest.approx(2 * slope_db, abs=0.01)


def test_so_many_peaks_are_cut_at_full_scale():
    samples = np.linspace(-0.1, 0.1, 10001, dtype=np.float32)
    cut = clip_peaks(samples, beyond=0.01)
    assert np.mean(np.abs(cut) == 1) == pytest.approx(0.01, abs=1e-3)
    within = np.abs(cut) < 1
    np.testing.assert_allclose(cut[within], samples[within] / np.float32(0.099), rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [lambda s: add_tone(s, RATE_HZ, hz=99, snr_db=0), lambda s: tilt(s, RATE_HZ, db=3)],
)
def test_silence_gets_neither_a_tone_nor_a_tilt(change):
    assert not change(np.zeros(8000, np.float32)).any()


def sweep(loudest=0.5):
    time_s = np.arange(2 * RATE_HZ + 77) / RATE_HZ
    swell = np.sin(np.linspace(0, 5 * np.pi, len(time_s))) ** 2
    tone = scipy.signal.chirp(time_s, 200, time_s[-1], 3000)
    return (loudest * swell * tone).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_loses_more_the_more_it_compresses_and_keeps_time(codec):
    samples = sweep()
    ratios = []
    for compression in (0.3, 0.99):
        out = coded(samples, RATE_HZ, codec=codec, compression=compression)
        assert out.dtype == np.float32
        assert out.shape == samples.shape
        ratios.append(db(rms(samples) / rms(out - samples)))
        correlation = scipy.signal.correlate(out, samples, method="fft")
        assert abs(correlation.argmax() - (len(samples) - 1)) <= 2
    assert 100 > ratios[0] > ratios[1] + 3
    assert ratios[0] > 20


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_does_not_cut_what_is_over_full_scale(codec):
    loud, soft = (
        coded(sweep(loudest), RATE_HZ, codec=codec, compression=0.5) for loudest in (2.0, 1.0)
    )
    assert np.abs(loud).max() > 1.9
    assert rms(loud) == pytest.approx(2 * rms(soft), rel=0.02)


def test_augment_takes_each_codec():
    recipe = Augmentation(**{**NEVER, "codec": 1.0}, compression=(0.9, 0.9))
    found = {augment(sweep(), RATE_HZ, generator(s), recipe).tobytes() for s in range(8)}
    assert found == {
        coded(sweep(), RATE_HZ, codec=name, compression=0.9).tobytes() for name in CODECS
    }


def test_augment_crops_a_part_of_the_clip():
    samples = np.arange(2 * RATE_HZ, dtype=np.float32)
    recipe = Augmentation(**{**NEVER, "crop": 1.0}, keep=(0.5, 0.5))
    out = augment(samples, RATE_HZ, generator(), recipe)
    assert len(out) == RATE_HZ
    np.testing.assert_array_equal(out, np.arange(RATE_HZ) + out[0])


def test_augment_without_chances_returns_an_equal_copy():
    samples = speech_like()
    out = augment(samples, RATE_HZ, generator(), Augmentation(**NEVER))
    np.testing.assert_array_equal(out, samples)
    assert not np.shares_memory(out, samples)


def test_augment_repeats_for_its_seed_and_never_touches_its_input():
    samples = speech_like()
    before = samples.copy()
    samples.flags.writeable = False
    for seed in range(5):
        first, again, other = (
            augment(samples, RATE_HZ, generator(one), Augmentation())
            for one in (seed, seed, seed + 9)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
    np.testing.assert_array_equal(samples, before)


@given(
    length=st.integers(6400, 20000),
    seed=st.integers(0, 999),
    probability=st.sampled_from([0.3, 1.0]),
    silent=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_augment_stays_within_its_bounds(length, seed, probability, silent):
    samples = np.zeros(length, np.float32) if silent else speech_like(1.25, seed)[:length]
    recipe = Augmentation(
        **dict.fromkeys(NEVER, probability), speed=(0.5, 2.0), keep=(0.1, 1.0), semitones=(-12, 12)
    )
    out = augment(samples, RATE_HZ, generator(seed), recipe)
    assert out.dtype == np.float32
    assert 6400 <= len(out) <= round(length / 0.5)
    assert np.isfinite(out).all()
    assert not silent or np.abs(out).max() <= 2**-15  # Opus leaves a bit


def test_augment_refuses_a_clip_that_is_too_short():
    with pytest.raises(CorpusError, match=r"0\.39 s to augment, allowed is 0\.4 s or more"):
        augment(np.zeros(6240, np.float32), RATE_HZ, generator(), ALWAYS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise": 1.5}, "noise = 1.5, allowed is a probability, 0 to 1"),
        ({"noise": [0.5]}, "noise = [0.5], allowed is a probability, 0 to 1"),
        ({"speed": 1.0}, "speed = 1.0, allowed is (low, high) within 0.5 to 2"),
        ({"speed": ("a", "b")}, "speed = ('a', 'b'), allowed is (low, high) within 0.5 to 2"),
        ({"noise": float("nan")}, "noise = nan, allowed is a probability, 0 to 1"),
        ({"speed": (0.1, 1.0)}, "speed = (0.1, 1.0), allowed is (low, high) within 0.5 to 2"),
        ({"keep": (0.5, 1.5)}, "keep = (0.5, 1.5), allowed is (low, high) within 0.001 to 1"),
        ({"snr_db": (9.0, 3.0)}, "snr_db = (9.0, 3.0), allowed is (low, high) within -100 to 100"),
        ({"snr_db": (9.0,)}, "snr_db = (9.0,), allowed is (low, high) within -100 to 100"),
    ],
)
def test_a_recipe_out_of_range_is_refused(values, message):
    with pytest.raises(RecipeError) as fault:
        Augmentation(**values)
    assert str(fault.value) == message


def test_a_recipe_takes_the_arrays_of_a_toml_file():
    recipe = Augmentation(**NEVER | {"gain": 1}, gain_db=[-6, -6])
    np.testing.assert_allclose(
        augment(speech_like(), RATE_HZ, generator(), recipe), speech_like() * 10 ** (-6 / 20)
    )
