"""Waveform augmentation: what rooms, microphones, channels and other speakers would change.

Every function takes mono float32 samples of shape (T,), leaves them as they are and returns new
float32 samples. Nothing is clipped: a gain may lift a peak over 1.
"""

import io
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal
import soundfile
import soxr

from edge_ser.audio import Samples, is_too_short
from export.errors import CorpusError, RecipeError

_FRAME = 512
_HOP = 128
_NOISE_FLOOR_HZ = 50.0
_TELEPHONE_HZ = (300.0, 3400.0)

CODECS = {"mp3": ("MP3", "MPEG_LAYER_III"), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}
"""The lossy codecs, by the names that libsndfile has for container and coding."""


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


def at_level_of(reference: Samples, samples: Samples) -> Samples:
    """Return `samples` with the root mean square of `reference`; silence stays silence."""
    level, wanted = _rms(samples), _rms(reference)
    return samples if level == 0 else samples * np.float32(wanted / level)


def _rms(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def gain(samples: Samples, *, gain_db: float) -> Samples:
    """Multiply by 10 ** (gain_db / 20)."""
    return samples * np.float32(10.0 ** (gain_db / 20.0))


def add_noise(
    samples: Samples,
    rate_hz: int,
    rng: np.random.Generator,
    *,
    snr_db: float,
    exponent: float = 0.0,
) -> Samples:
    """Add Gaussian noise whose power falls with frequency ** exponent, level below 50 Hz.

    The ratio is that of the mean powers of this clip and of this very noise, and so is met exactly;
    pauses count. Silence has no level to relate the noise to and stays silence.

    Args:
        samples: float32 of shape (T,).
        rate_hz: Of the samples.
        rng: Source of the noise.
        snr_db: Signal-to-noise ratio in dB.
        exponent: 0 is white, 1 pink, 2 brown.

    Returns:
        float32 of shape (T,).
    """
    noise = rng.standard_normal(len(samples), np.float32)
    if exponent:
        size = scipy.fft.next_fast_len(len(samples), real=True)
        hz = np.fft.rfftfreq(size, 1 / rate_hz).astype(np.float32)
        shape = np.maximum(hz, np.float32(_NOISE_FLOOR_HZ)) ** np.float32(-exponent / 2)
        noise = scipy.fft.irfft(scipy.fft.rfft(noise, size) * shape, size)[: len(samples)]
    wanted = _rms(samples) * 10.0 ** (-snr_db / 20.0)
    return samples + noise * np.float32(wanted / _rms(noise))


def add_tone(samples: Samples, rate_hz: int, *, hz: float, snr_db: float) -> Samples:
    """Add a sine at its ratio to the mean power of the clip; silence stays silence."""
    sine = np.sin(2 * np.pi * hz / rate_hz * np.arange(len(samples))).astype(np.float32)
    return samples + sine * np.float32(np.sqrt(2) * _rms(samples) * 10.0 ** (-snr_db / 20.0))


def tilt(samples: Samples, rate_hz: int, *, db: float) -> Samples:
    """Tilt the spectrum by so many dB an octave, level below 50 Hz, at the level of before."""
    hz = np.fft.rfftfreq(len(samples), 1 / rate_hz)
    octaves = np.log2(np.maximum(hz, _NOISE_FLOOR_HZ) / 1000)
    tilted = scipy.fft.irfft(scipy.fft.rfft(samples) * 10 ** (db * octaves / 20), len(samples))
    return at_level_of(samples, tilted.astype(np.float32))


def clip_peaks(samples: Samples, *, beyond: float) -> Samples:
    """Amplify until a share ``beyond`` of the samples lies over full scale, and cut these."""
    full = max(float(np.quantile(np.abs(samples), 1 - beyond)), 1e-6)
    return np.clip(samples / np.float32(full), -1, 1)


def time_stretch(samples: Samples, *, speed: float) -> Samples:
    """Change the tempo and keep the pitch, by a phase vocoder.

    Each bin's magnitude is interpolated between frames and its phase advanced by the measured
    frequency (Flanagan and Golden, Phase Vocoder, 1966; Dolson, A Phase Vocoder Tutorial, 1986).
    Phases of neighbouring bins are not locked: a tone may lose 1 dB, voices sound hollow beyond
    some 0.8 to 1.25, and onsets smear over a frame (512 samples).

    Args:
        samples: float32 of shape (T,).
        speed: Above 1 is faster.

    Returns:
        float32 of shape (round(T / speed),).
    """
    length = round(len(samples) / speed)
    if length == len(samples):
        return samples.copy()
    window = _window()
    frames = np.lib.stride_tricks.sliding_window_view(
        np.pad(samples, (_FRAME // 2, _FRAME // 2 + 2 * _HOP)), _FRAME
    )[::_HOP]
    spectra = scipy.fft.rfft(frames * window)  # (F, B)
    count = -(-length // _HOP) + 1
    position = np.minimum(np.arange(count) * (len(samples) / length), len(spectra) - 2)
    before = position.astype(int)
    after = (position - before).astype(np.float32)[:, None]
    magnitude = np.abs(spectra)
    magnitude = magnitude[before] * (1 - after) + magnitude[before + 1] * after
    phase = np.angle(spectra)
    # The phase that a bin's centre gains in a hop is an integer number of quarter turns here; the
    # difference need not be unwrapped, since only its exponential is taken.
    steps = (phase[before + 1] - phase[before])[:-1]
    turned = np.cumsum(np.concatenate([phase[before[:1]], steps]), axis=0, dtype=np.float64)
    turned = np.remainder(turned, 2 * np.pi).astype(np.float32)
    rebuilt = np.empty(magnitude.shape, np.complex64)
    rebuilt.real, rebuilt.imag = magnitude * np.cos(turned), magnitude * np.sin(turned)
    out = _overlap_add(scipy.fft.irfft(rebuilt, _FRAME) * window)
    return out[_FRAME // 2 : _FRAME // 2 + length]


@cache
def _window() -> Samples:
    # Squared and laid at every quarter frame, Hann windows add up to 3/2.
    return np.asarray(scipy.signal.get_window("hann", _FRAME) * np.sqrt(2 / 3), np.float32)


def _overlap_add(frames: Samples) -> Samples:
    quarters = frames.reshape(len(frames), _FRAME // _HOP, _HOP)  # (F, 4, hop)
    out = np.zeros((len(frames) + _FRAME // _HOP - 1, _HOP), np.float32)
    for number in range(_FRAME // _HOP):
        out[number : number + len(frames)] += quarters[:, number]
    return out.ravel()


def pitch_shift(samples: Samples, *, semitones: float) -> Samples:
    """Change the pitch and keep the length: a stretch, then resampling back.

    Formants move with the pitch, as with a larger or smaller speaker, and the limits of
    `time_stretch` hold. Raised, nothing folds back; lowered, the top of the band is empty.

    Args:
        samples: float32 of shape (T,).
        semitones: Above 0 is higher; the ratio is 2 ** (semitones / 12).

    Returns:
        float32 of shape (T,).
    """
    if semitones == 0:
        return samples.copy()
    ratio = 2.0 ** (semitones / 12.0)
    longer = time_stretch(samples, speed=1 / ratio)
    return soxr.resample(longer, len(longer), len(samples), quality="MQ")


def shift(samples: Samples, rate_hz: int, *, shift_s: float) -> Samples:
    """Move the clip in time within its length; positive is later, and what is left is silence."""
    offset = int(np.clip(round(shift_s * rate_hz), -len(samples), len(samples)))
    out = np.zeros_like(samples)
    if offset >= 0:
        out[offset:] = samples[: len(samples) - offset]
    else:
        out[:offset] = samples[-offset:]
    return out


def telephone(samples: Samples, rate_hz: int) -> Samples:
    """Keep 300 to 3400 Hz, the telephone band of ITU-T G.712, by a Butterworth band-pass.

    Each slope has order 4: 3 dB down at the edges, some 40 dB at 100 Hz and, at a rate of 16 kHz,
    at 6 kHz. The rate must be above 6.8 kHz.
    """
    return scipy.signal.sosfilt(_telephone_sections(rate_hz), samples).astype(np.float32)


@cache
def _telephone_sections(rate_hz: int) -> npt.NDArray[np.float64]:
    return np.asarray(
        scipy.signal.butter(4, _TELEPHONE_HZ, "bandpass", fs=rate_hz, output="sos"), np.float64
    )


def coded(samples: Samples, rate_hz: int, *, codec: str, compression: float) -> Samples:
    """Return what is left of the samples behind a lossy codec.

    Args:
        samples: float32 of shape (T,).
        rate_hz: Of the samples; Opus takes 8, 12, 16, 24 and 48 kHz.
        codec: One of `CODECS`.
        compression: 0 to 0.99.

    Returns:
        float32 of shape (T,), where it was in time.
    """
    container, coding = CODECS[codec]
    # Codecs clip what lies over full scale.
    peak = np.float32(max(1.0, np.abs(samples).max()))
    file = io.BytesIO()
    soundfile.write(
        file, samples / peak, rate_hz, coding, format=container, compression_level=compression
    )
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32")
    out = np.zeros_like(samples)
    out[: len(decoded)] = decoded[: len(samples)] * peak
    return out


def room(
    samples: Samples,
    rate_hz: int,
    rng: np.random.Generator,
    *,
    rt60_s: float,
    direct_db: float,
) -> Samples:
    """Add reverberation: noise that decays by 60 dB in `rt60_s` behind the direct sound.

    The simplest statistical room (Polack's model): no early reflections, one decay for all
    frequencies. The direct sound keeps its level and the tail beyond the end is cut.

    Args:
        samples: float32 of shape (T,).
        rate_hz: Of the samples.
        rng: Source of the response.
        rt60_s: Reverberation time in seconds.
        direct_db: Energy of the direct sound over that of the tail, in dB.

    Returns:
        float32 of shape (T,).
    """
    count = max(1, min(round(rt60_s * rate_hz), len(samples) - 1))
    # 60 dB are a factor of 1000 in amplitude.
    rate = np.float32(np.log(1e3) / (rt60_s * rate_hz))
    decay = np.exp(-rate * np.arange(count, dtype=np.float32))
    tail = rng.standard_normal(count, np.float32) * decay
    tail *= np.float32(10.0 ** (-direct_db / 20.0) / np.linalg.norm(tail))
    response = np.concatenate([np.ones(1, np.float32), tail])
    return scipy.signal.oaconvolve(samples, response)[: len(samples)].astype(np.float32)
