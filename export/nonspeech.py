"""Sounds that are no speech: noise, tones like music, hum, near silence. None is an emotion.

They are trained on with all labels alike likely (outlier exposure, arXiv 1812.04606), and others of
their kind are scored in the certificate.
"""

import math

import numpy as np
import numpy.typing as npt

from edge_ser.audio import Samples
from export.effects import add_noise

KINDS = ("noise", "music", "hum", "silence")


def sound(kind: str, seed: int, seconds: float, rate_hz: int) -> Samples:
    """Return a sound, float32 (T,).

    Args:
        kind: One of `KINDS`: noise of any colour, steady or swelling; chords of decaying harmonic
            tones; mains hum with a little noise; zeros, or noise of a last bit or two.
        seed: Of all chance.
        seconds: Length.
        rate_hz: Of the samples.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    length = round(seconds * rate_hz)
    time_s = np.arange(length) / rate_hz
    if kind == "silence":
        bits = rng.choice([0.0, 1.0, 2.0])
        return np.asarray(np.round(bits * rng.standard_normal(length)) / 2**15, np.float32)
    if kind == "noise":
        samples = _noise(rng, length, rate_hz)
        if rng.random() < 0.5:
            swell = np.sin(2 * np.pi * (rng.uniform(0.2, 5) * time_s + rng.random()))
            samples = samples * (1 + 0.9 * swell)
    elif kind == "hum":
        mains_hz = rng.choice([50.0, 60.0])
        orders = np.arange(1, 12)[:, None]
        tones = np.sin(2 * np.pi * (mains_hz * orders * time_s + rng.random(orders.shape)))
        samples = (rng.uniform(0, 1, orders.shape) / orders * tones).sum(axis=0)
        samples = samples + rng.uniform(0, 0.3) * _noise(rng, length, rate_hz)
    else:
        samples = np.zeros(length)
        start_s = 0.0
        while start_s < seconds:
            begin = math.ceil(start_s * rate_hz)
            samples[begin:] += _chord(rng, time_s[begin:] - start_s)
            start_s += rng.uniform(0.15, 0.9)
    level_db = rng.uniform(-50, -8)
    loudest = max(float(np.abs(samples).max()), 1e-9)
    return np.asarray(samples / loudest * 10 ** (level_db / 20), np.float32)


def _noise(rng: np.random.Generator, length: int, rate_hz: int) -> Samples:
    # The noise is as loud as one; what it is added to is 80 dB below.
    faint = np.full(length, 1e-4, np.float32)
    return add_noise(faint, rate_hz, rng, snr_db=-80.0, exponent=float(rng.uniform(0, 2)))


def _chord(rng: np.random.Generator, time_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return one to four notes of the tempered scale that began at 0 and decay."""
    notes_hz = 110 * 2 ** (rng.integers(0, 40, rng.integers(1, 5)) / 12)
    overtones = np.arange(1, rng.integers(2, 9))
    envelope = np.minimum(time_s / 0.01, 1) * np.exp(-time_s / 0.4)
    vibrato = rng.uniform(0, 0.003) * np.sin(2 * np.pi * rng.uniform(4, 7) * time_s)
    samples = np.zeros(len(time_s))
    for note_hz in notes_hz:
        for order in overtones[overtones * note_hz < 7000]:
            samples += np.sin(2 * np.pi * order * note_hz * (time_s + vibrato)) / order
    return samples * envelope
