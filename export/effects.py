"""What rooms, microphones, channels and other speakers change of a waveform.

Every function takes mono float32 samples of shape (T,), leaves them as they are and returns new
float32 samples. Nothing is clipped: a gain may lift a peak over 1.
"""

import io
from functools import cache

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal
import soundfile
import soxr

from edge_ser.audio import Samples

_FRAME = 512
_HOP = 128
_NOISE_FLOOR_HZ = 50.0
_TELEPHONE_HZ = (300.0, 3400.0)

CODECS = {"mp3": ("MP3", "MPEG_LAYER_III"), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}
"""The lossy codecs, by the names that libsndfile has for container and coding."""


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
