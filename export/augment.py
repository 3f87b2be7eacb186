"""Augmentation of a clip: which of the effects happen to it, and how much, drawn by chance."""

from dataclasses import dataclass, fields

import numpy as np

from edge_ser.audio import Samples, is_too_short
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


@dataclass(frozen=True)
class Augmentation:
    """How often and how much to augment: probabilities and (low, high) ranges, drawn uniformly.

    Attributes:
        stretch: Probability of another tempo.
        speed: Tempo factor, 0.5 to 2; above 1 is faster and shorter.
        pitch: Probability of another pitch.
        semitones: Pitch shift, -12 to 12.
        crop: Probability of keeping a part only.
        keep: Part of the clip that is kept, above 0 to 1.
        shift: Probability of a shift in time.
        shift_s: Shift in seconds; positive is later.
        room: Probability of reverberation.
        rt60_s: Reverberation time in seconds, above 0.
        direct_db: Energy of the direct sound over that of the reverberation, in dB.
        tilt: Probability of a tilted spectrum, as of another microphone.
        tilt_db: Its slope in dB an octave; positive is brighter.
        tone: Probability of a steady tone, at the ratio that noise has.
        tone_hz: Its frequency in Hz, 1 to 8000, drawn evenly on a logarithmic scale.
        noise: Probability of noise.
        snr_db: Signal-to-noise ratio in dB.
        noise_exponent: Slope of the noise: power falls with frequency to this power; 0 is white,
            1 pink, 2 brown.
        clipping: Probability of peaks beyond full scale, cut off.
        clipped: Share of the samples that are cut, 0 to 0.5.
        telephone: Probability of the telephone band.
        gain: Probability of another level.
        gain_db: Gain in dB.
        codec: Probability of a lossy codec, any of `CODECS`.
        compression: How far it compresses, 0 to 0.99. From 0.6 to 0.99 speech at 16 kHz takes 26 to
            14 kbit/s in MP3, 44 to 34 in Vorbis, 111 to 10 in Opus (measured on a RAVDESS clip).

    Raises:
        RecipeError: A probability or range outside of what is given above.
    """

    stretch: float = 0.3
    speed: tuple[float, float] = (0.85, 1.15)
    pitch: float = 0.3
    semitones: tuple[float, float] = (-2.0, 2.0)
    crop: float = 0.3
    keep: tuple[float, float] = (0.7, 1.0)
    shift: float = 0.5
    shift_s: tuple[float, float] = (-0.1, 0.1)
    room: float = 0.2
    rt60_s: tuple[float, float] = (0.1, 0.6)
    direct_db: tuple[float, float] = (0.0, 15.0)
    tilt: float = 0.3
    tilt_db: tuple[float, float] = (-4.0, 4.0)
    tone: float = 0.1
    tone_hz: tuple[float, float] = (50.0, 7000.0)
    noise: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    noise_exponent: tuple[float, float] = (0.0, 1.5)
    clipping: float = 0.2
    clipped: tuple[float, float] = (0.0005, 0.01)
    telephone: float = 0.1
    gain: float = 0.5
    gain_db: tuple[float, float] = (-15.0, 6.0)
    codec: float = 0.0
    compression: tuple[float, float] = (0.6, 0.99)

    def __post_init__(self) -> None:
        allowed = {
            "speed": (0.5, 2.0),
            "semitones": (-12.0, 12.0),
            "keep": (1e-3, 1.0),
            "rt60_s": (1e-3, 5.0),
            "tone_hz": (1.0, 8000.0),
            "noise_exponent": (0.0, 2.0),
            "clipped": (0.0, 0.5),
            "compression": (0.0, 0.99),
        }
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(field.default, tuple):
                if not (_are_numbers(value) and 0.0 <= value <= 1.0):
                    raise RecipeError(f"{name} = {value!r}, allowed is a probability, 0 to 1")
                continue
            lowest, highest = allowed.get(name, (-100.0, 100.0))
            pair = isinstance(value, tuple | list) and len(value) == 2 and _are_numbers(*value)
            if not (pair and lowest <= value[0] <= value[1] <= highest):
                raise RecipeError(
                    f"{name} = {value!r}, allowed is (low, high) within {lowest:g} to {highest:g}"
                )


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def augment(
    samples: Samples, rate_hz: int, rng: np.random.Generator, recipe: Augmentation
) -> Samples:
    """Augment one clip: voice, then room, microphone, noise, channel, level and codec.

    All but noise, a tone, and the gain and a codec, which come last, are brought back to the level
    (root mean square) of what they were given; noise and a tone are added at their ratio to it.

    Args:
        samples: float32 of shape (T,), at least 0.4 s.
        rate_hz: Of the samples; with a codec one that Opus takes: 8, 12, 16, 24 or 48 kHz.
        rng: All chance comes from here: the same state gives the same samples.
        recipe: Probabilities and ranges.

    Returns:
        New float32 samples, at least 0.4 s (a faster tempo is held back, a part made longer) and
        at most round(T / min(1, lower end of `speed`)) long.

    Raises:
        CorpusError: The clip is shorter than 0.4 s.
    """
    if is_too_short(len(samples), rate_hz):
        raise CorpusError(f"{len(samples) / rate_hz:g} s to augment, allowed is 0.4 s or more")
    shortest = -(-2 * rate_hz // 5)  # the least that is not too short

    def chosen(probability: float) -> bool:
        return bool(rng.random() < probability)

    out = np.array(samples, np.float32)
    if chosen(recipe.stretch):
        speed = min(rng.uniform(*recipe.speed), len(out) / shortest)
        out = at_level_of(out, time_stretch(out, speed=speed))
    if chosen(recipe.pitch):
        out = at_level_of(out, pitch_shift(out, semitones=rng.uniform(*recipe.semitones)))
    if chosen(recipe.crop):
        length = max(shortest, round(len(out) * rng.uniform(*recipe.keep)))
        start = int(rng.integers(len(out) - length, endpoint=True))
        out = out[start : start + length]
    if chosen(recipe.shift):
        out = shift(out, rate_hz, shift_s=rng.uniform(*recipe.shift_s))
    if chosen(recipe.room):
        rt60_s, direct_db = rng.uniform(*recipe.rt60_s), rng.uniform(*recipe.direct_db)
        out = at_level_of(out, room(out, rate_hz, rng, rt60_s=rt60_s, direct_db=direct_db))
    if chosen(recipe.tilt):
        out = tilt(out, rate_hz, db=rng.uniform(*recipe.tilt_db))
    if chosen(recipe.tone):
        hz = np.exp(rng.uniform(*np.log(recipe.tone_hz)))
        out = add_tone(out, rate_hz, hz=hz, snr_db=rng.uniform(*recipe.snr_db))
    if chosen(recipe.noise):
        snr_db, exponent = rng.uniform(*recipe.snr_db), rng.uniform(*recipe.noise_exponent)
        out = add_noise(out, rate_hz, rng, snr_db=snr_db, exponent=exponent)
    if chosen(recipe.clipping):
        out = at_level_of(out, clip_peaks(out, beyond=rng.uniform(*recipe.clipped)))
    if chosen(recipe.telephone):
        out = at_level_of(out, telephone(out, rate_hz))
    if chosen(recipe.gain):
        out = gain(out, gain_db=rng.uniform(*recipe.gain_db))
    if chosen(recipe.codec):
        codec = sorted(CODECS)[rng.integers(len(CODECS))]
        out = coded(out, rate_hz, codec=codec, compression=rng.uniform(*recipe.compression))
    return out
