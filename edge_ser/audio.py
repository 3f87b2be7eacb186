"""Audio in: a file, its bytes or an array become mono float32 samples at the bundle's rate.

Every check of the input is made here, once. Audio is read, averaged and resampled in blocks, so an
hour of it needs no more memory than a second.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_ser.errors import AudioError

Samples: TypeAlias = NDArray[np.float32]
Audio: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any]"

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 192_000
MAX_CHANNELS = 8
BLOCK = 1 << 16  # frames read at a time

# What one unit of an array is worth: integers span -1 to 1 (1 excluded), floats are taken as they
# are, louder than 1 too.
_UNITS = {np.int16: 2.0**-15, np.int32: 2.0**-31, np.float32: 1.0, np.float64: 1.0}

# The formats whose reader tells whether the file is complete (Ogg promises no length).
_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG", "MP3"}
_USE = "use WAV, FLAC, Ogg, MP3, AIFF or AU"

# libsndfile shortens a promised length silently, but notes it in its log of the header.
_SHORTENED = re.compile(
    r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.M
)
# Programs that write to a pipe cannot know the length. They promise the most that the field holds:
# 0xFFFFFFFF (ffmpeg), 0x7FFFFFFF (arecord), 0x7F000008 (sox).
_UNKNOWN_LENGTH = 0x7F000000
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's number for a FLAC from a pipe


def is_too_short(samples: int, rate_hz: int) -> bool:
    """Return whether this many samples last less than 0.4 s, the least that a graph takes."""
    return 5 * samples < 2 * rate_hz  # in whole numbers: 0.4 has no exact float


def read(audio: Audio, sample_rate_hz: int | None = None, *, rate_hz: int) -> Samples:
    """Return all of `blocks` in one array, float32 of shape (T,)."""
    return np.concatenate(list(blocks(audio, sample_rate_hz, rate_hz=rate_hz)))


def blocks(audio: Audio, sample_rate_hz: int | None = None, *, rate_hz: int) -> Iterator[Samples]:
    """Yield audio as mono float32 samples, block after block.

    At ``rate_hz`` already, one channel passes bit by bit; other rates are resampled by soxr (HQ).

    Args:
        audio: The path of a file, the bytes of one, or an array: int16, int32, float32 or float64,
            of shape (samples,) or (samples, channels). Up to 8 channels are averaged.
        sample_rate_hz: The rate of an array, 4000 to 192000. A file tells its own.
        rate_hz: The rate to return.

    Yields:
        Arrays of shape (n,), n > 0 and about 65536 at the most at equal rates. Integers are scaled
        to -1 ... 1; floats are not.

    Raises:
        AudioError: The input is refused. Some faults show only at the end of a file: they are
            raised there, after the blocks before them.
    """
    if isinstance(audio, np.ndarray):
        name, rate, frames = "the array", _array_rate(audio, sample_rate_hz), _array_blocks(audio)
    elif isinstance(audio, str | os.PathLike | bytes):
        if sample_rate_hz is not None:
            raise AudioError(f"sample_rate_hz is {sample_rate_hz!r}; only an array needs it")
        name = "the audio" if isinstance(audio, bytes) else repr(os.fspath(audio))
        rate, frames = _open(audio, name)
    else:
        given = type(audio).__name__
        raise AudioError(f"audio is a {given}; allowed: a path, the bytes of a file, or an array")
    mono = _checked(frames, name, rate)
    return mono if rate == rate_hz else _resampled(mono, rate, rate_hz)


def _array_rate(array: NDArray[Any], rate_hz: int | None) -> int:
    """Check the type, the shape and the rate of an array; return the rate."""
    if array.dtype.type not in _UNITS:
        allowed = ", ".join(kind.__name__ for kind in _UNITS)
        raise AudioError(f"the array is of {array.dtype.name}; allowed: {allowed}")
    if array.ndim not in (1, 2):
        raise AudioError(
            f"the array has shape {array.shape}; allowed: (samples,) or (samples, channels)"
        )
    if array.ndim == 2 and array.shape[0] <= MAX_CHANNELS < array.shape[1]:
        raise AudioError(
            f"the array has shape {array.shape}, which looks like (channels, samples); "
            "allowed: (samples, channels), so give array.T"
        )
    if rate_hz is None:
        raise AudioError("an array does not tell its rate; give sample_rate_hz=")
    _check_source("the array", rate_hz, 1 if array.ndim == 1 else array.shape[1])
    return int(rate_hz)


def _array_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield float32 blocks of shape (n,) or (n, channels)."""
    unit = np.float32(_UNITS[array.dtype.type])
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        if block.dtype != np.float32:
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf: refused below
                block = block.astype(np.float32)
        yield block if unit == 1 else block * unit


def _open(audio: str | os.PathLike[str] | bytes, name: str) -> tuple[int, Iterator[Samples]]:
    """Open a file and check its header; return its rate and its blocks."""
    import soundfile  # type: ignore[import-untyped, unused-ignore]

    if not isinstance(audio, bytes):
        _check_path(audio, name)
    if not (len(audio) if isinstance(audio, bytes) else os.stat(audio).st_size):
        raise AudioError(f"{name} is empty (0 bytes); record or copy it again")
    try:
        file = soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else audio)
    except (soundfile.LibsndfileError, TypeError) as exc:  # TypeError: the name ends in .raw
        reason = getattr(exc, "error_string", "samples without a header").rstrip(".")
        raise AudioError(f"{name} is not audio ({reason}); {_USE}") from exc
    try:
        _check_header(file, name)
    except AudioError:
        file.close()
        raise
    return file.samplerate, _file_blocks(file, name)


def _check_path(path: str | os.PathLike[str], name: str) -> None:
    try:
        if not Path(path).exists():
            raise AudioError(f"{name} does not exist; give the path of an audio file")
        if not Path(path).is_file():
            kind = "a folder" if Path(path).is_dir() else "not a regular file"
            raise AudioError(f"{name} is {kind}; give the path of an audio file")
        if not os.access(path, os.R_OK):
            raise PermissionError(None, "no permission")
    except OSError as exc:
        raise AudioError(f"{name} cannot be read ({exc.strerror}); choose another file") from exc


def _check_header(file: Any, name: str) -> None:
    if file.format not in _FORMATS:
        raise AudioError(f"{name} is in the format {file.format}; {_USE}")
    for promised, held in _SHORTENED.findall(file.extra_info):
        if int(promised) < _UNKNOWN_LENGTH:
            raise AudioError(_truncated(name, f"{promised} bytes of samples, {held} are there"))
    _check_source(name, file.samplerate, file.channels)


def _file_blocks(file: Any, name: str) -> Iterator[Samples]:
    """Yield float32 blocks of shape (n, channels) of an open SoundFile, and close it."""
    import soundfile

    # Else soundfile seeks after every read: MP3 then decodes a little differently and complains on
    # stderr, and a FLAC of unknown length fails.
    file.seekable = lambda: False
    decoded = 0
    with file:
        while decoded < file.frames:
            try:
                block = file.read(BLOCK, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                break  # a FLAC whose rest cannot be decoded
            if not len(block):
                break  # an MP3 that ends early
            decoded += len(block)
            yield block
        if decoded < file.frames != _UNKNOWN_FRAMES:
            raise AudioError(_truncated(name, f"{file.frames} samples, fewer can be decoded"))


def _truncated(name: str, promise: str) -> str:
    return f"{name} is truncated or damaged: its header promises {promise}; copy it again"


def _check_source(name: str, rate_hz: int, channels: int) -> None:
    if not isinstance(rate_hz, int | np.integer) or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        allowed = f"{MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, a whole number"
        raise AudioError(f"{name} has a rate of {rate_hz!r}; allowed: {allowed}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{name} has {channels} channels; allowed: 1 to {MAX_CHANNELS}")


def _checked(frames: Iterator[NDArray[Any]], name: str, rate_hz: int) -> Iterator[Samples]:
    """Average the channels of each block; refuse what is not finite, and too little in all."""
    total = 0
    for block in frames:
        if block.ndim == 2:
            with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN survive the mean
                block = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        finite = np.isfinite(block)
        if not finite.all():
            first = total + int(finite.argmin())
            raise AudioError(
                f"{name} has NaN or infinity at sample {first}; allowed: finite values"
            )
        total += len(block)
        yield block
    if not total:
        raise AudioError(f"{name} holds 0 samples; record or copy it again")
    if is_too_short(total, rate_hz):
        length = f"{total / rate_hz:.4g} s long ({total} samples at {rate_hz} Hz)"
        raise AudioError(f"{name} is {length}; allowed: 0.4 s or more")


def _resampled(mono: Iterator[Samples], rate_hz: int, target_hz: int) -> Iterator[Samples]:
    import soxr  # type: ignore[import-untyped, unused-ignore]

    stream = soxr.ResampleStream(rate_hz, target_hz, 1, dtype="float32")
    for block in mono:
        if len(resampled := stream.resample_chunk(block)):
            yield resampled
    if len(rest := stream.resample_chunk(np.empty(0, np.float32), last=True)):
        yield rest
