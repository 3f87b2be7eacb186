import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_ser import AudioError, audio

RATE = 16_000
TONE = (0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)).astype(np.float32)
NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)


def encoded(samples, rate=RATE, **format):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **format)
    return file.getvalue()


def wav(promised_bytes, samples=8000):
    """A 16-bit WAV whose header promises a number of bytes of its own choice."""
    pcm = np.arange(samples, dtype="<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    riff = struct.pack("<4sI4s4s", b"RIFF", min(promised_bytes + 36, 2**32 - 1), b"WAVE", b"fmt ")
    return riff + form + struct.pack("<4sI", b"data", promised_bytes) + pcm


# Accepted: arrays


@given(hnp.arrays(np.int16, st.integers(6400, 6500), elements=st.integers(-(2**15), 2**15 - 1)))
@settings(max_examples=20)
def test_int16_spans_minus_one_to_one(array):
    np.testing.assert_array_equal(audio.read(array, RATE, rate_hz=RATE), array / np.float32(2**15))


@given(hnp.arrays(np.int32, st.integers(6400, 6500), elements=st.integers(-(2**31), 2**31 - 1)))
@settings(max_examples=20)
def test_int32_spans_minus_one_to_one(array):
    expected = (array / 2**31).astype(np.float32)
    np.testing.assert_array_equal(audio.read(array, RATE, rate_hz=RATE), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_taken_as_they_are_louder_than_one_too(dtype):
    array = np.full(6400, 2.5, dtype)
    samples = audio.read(array, RATE, rate_hz=RATE)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, array)


def test_a_float32_array_at_the_rate_passes_bit_by_bit_and_without_a_copy():
    (block,) = audio.blocks(NOISE, RATE, rate_hz=RATE)
    assert np.shares_memory(block, NOISE)
    assert block.tobytes() == NOISE.tobytes()


def test_another_byte_order_is_the_same_array():
    array = np.arange(6400, dtype=">i2")
    np.testing.assert_array_equal(
        audio.read(array, RATE, rate_hz=RATE), np.arange(6400, dtype=np.float32) / 2**15
    )


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(channels):
    array = np.tile(np.arange(channels, dtype=np.float32), (6400, 1))
    samples = audio.read(array, RATE, rate_hz=RATE)
    np.testing.assert_array_equal(samples, np.full(6400, (channels - 1) / 2, np.float32))


def test_the_shortest_clip_lasts_four_tenths_of_a_second():
    assert len(audio.read(np.zeros(6400), RATE, rate_hz=RATE)) == 6400


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_every_rate_arrives_at_the_bundles_rate(rate):
    tone = np.sin(np.arange(rate) * 2 * np.pi * 440 / rate)
    samples = audio.read(tone, rate, rate_hz=RATE)
    assert len(samples) == RATE
    middle = slice(RATE // 10, -RATE // 10)  # the ends ring
    expected = np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)
    np.testing.assert_allclose(samples[middle], expected[middle], atol=1e-3)


@given(
    rate=st.integers(4_000, 192_000),
    target=st.sampled_from([8_000, 16_000]),
    length_s=st.floats(0.4, 1.0),
    block=st.integers(100, 5_000),
)
@settings(max_examples=30, deadline=None)
def test_resampling_in_blocks_equals_resampling_at_once(rate, target, length_s, block):
    array = np.random.default_rng(rate).normal(0, 0.1, int(length_s * rate) + 1).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "BLOCK", block)
        samples = audio.read(array, rate, rate_hz=target)
    expected = soxr.resample(array, rate, target)
    assert len(samples) == len(expected)
    np.testing.assert_allclose(samples, expected, atol=1e-6)
    assert not audio.is_too_short(len(samples), target)


# Accepted: files


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_file_its_path_and_its_bytes_are_the_same_samples(tmp_path, subtype):
    content = encoded(TONE, format="WAV", subtype=subtype)
    (tmp_path / "tone.wav").write_bytes(content)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    for same in (content, tmp_path / "tone.wav", str(tmp_path / "tone.wav")):
        np.testing.assert_array_equal(audio.read(same, rate_hz=RATE), expected)


@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "IMA_ADPCM"),
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_every_format_reads_in_blocks_as_it_does_at_once(monkeypatch, format, subtype):
    content = encoded(NOISE, format=format, subtype=subtype)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    monkeypatch.setattr(audio, "BLOCK", 1000)
    samples = audio.read(content, rate_hz=RATE)
    assert len(samples) >= len(NOISE)  # ADPCM fills its last packet
    # soundfile.read seeks first, and after a seek the last bit of an MP3 differs
    np.testing.assert_allclose(samples, expected, atol=1e-7 if format == "MP3" else 0)


@pytest.mark.parametrize("marker", [0xFFFFFFFF, 0x7FFFFFFE, 0x7F000008])
def test_a_wav_from_a_pipe_promises_no_length_and_is_read_to_its_end(marker):
    samples = audio.read(wav(marker), rate_hz=RATE)
    np.testing.assert_array_equal(samples, np.arange(8000, dtype=np.float32) / 2**15)


def test_a_flac_from_a_pipe_promises_no_length_and_is_read_to_its_end():
    content = bytearray(encoded(NOISE, format="FLAC"))
    content[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    content[22:26] = bytes(4)
    expected = np.round(NOISE * 2**15) / np.float32(2**15)
    np.testing.assert_allclose(audio.read(bytes(content), rate_hz=RATE), expected, atol=2**-15)


def test_a_file_of_two_channels_is_averaged():
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    samples = audio.read(encoded(stereo, format="WAV", subtype="FLOAT"), rate_hz=RATE)
    np.testing.assert_array_equal(samples, TONE / 2)


def test_an_hour_needs_the_memory_of_a_block(tmp_path):
    hour = 3600 * 8_000
    with (tmp_path / "hour.wav").open("wb") as file:  # silence, sparse on the disk
        file.write(wav(2 * hour, samples=0).replace(struct.pack("<II", RATE, 2 * RATE),
                                                    struct.pack("<II", 8_000, 16_000)))  # fmt: skip
        file.truncate(44 + 2 * hour)
    tracemalloc.start()
    total = sum(map(len, audio.blocks(tmp_path / "hour.wav", rate_hz=RATE)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 2 * hour
    assert peak < 4e6  # the hour itself is 230 MB


# Refused: each with its exact line

HALF = "truncated or damaged: its header promises"
USE = "use WAV, FLAC, Ogg, MP3, AIFF or AU"
FILES = {
    "no-samples.wav": (
        encoded(TONE[:0], format="WAV"),
        "holds 0 samples; record or copy it again",
    ),
    "empty.wav": (b"", "is empty (0 bytes); record or copy it again"),
    "text.wav": (b"not audio at all", f"is not audio (Format not recognised); {USE}"),
    "header.wav": (
        encoded(TONE, format="WAV")[:20],
        f"is not audio (Error in WAV/W64/RF64 file. Malformed 'fmt ' chunk); {USE}",
    ),
    "headless.caf": (
        encoded(TONE, format="CAF")[:2000],
        f"is not audio (Supported file format but file is malformed); {USE}",
    ),
    "exotic.caf": (encoded(TONE, format="CAF"), f"is in the format CAF; {USE}"),
    "short.wav": (
        encoded(TONE[:6399], format="WAV"),
        "is 0.3999 s long (6399 samples at 16000 Hz); allowed: 0.4 s or more",
    ),
    "nine.wav": (
        encoded(np.zeros((8000, 9)), format="WAV"),
        "has 9 channels; allowed: 1 to 8",
    ),
    "slow.wav": (
        encoded(TONE, 3999, format="WAV"),
        "has a rate of 3999; allowed: 4000 to 192000 Hz, a whole number",
    ),
    "nan.wav": (
        encoded(np.where(np.arange(RATE) == 9, np.nan, TONE), format="WAV", subtype="FLOAT"),
        "has NaN or infinity at sample 9; allowed: finite values",
    ),
    "cut.wav": (
        encoded(TONE, format="WAV")[:-1000],
        f"is {HALF} 32000 bytes of samples, 31000 are there; copy it again",
    ),
    "one-byte.wav": (
        encoded(TONE, format="WAV")[:-1],
        f"is {HALF} 32000 bytes of samples, 31999 are there; copy it again",
    ),
    "cut.rf64": (
        encoded(TONE, format="RF64")[:-1000],
        f"is {HALF} 32096 bytes of samples, 31096 are there; copy it again",
    ),
    "cut.w64": (
        encoded(TONE, format="W64")[:-1000],
        f"is {HALF} 32104 bytes of samples, 31104 are there; copy it again",
    ),
    "cut.aiff": (
        encoded(TONE, format="AIFF")[:-1000],
        f"is {HALF} 32008 bytes of samples, 31008 are there; copy it again",
    ),
    "cut.au": (
        encoded(TONE, format="AU")[:-1000],
        f"is {HALF} 32000 bytes of samples, 31000 are there; copy it again",
    ),
    "cut.flac": (
        encoded(NOISE, format="FLAC")[:-1000],
        f"is {HALF} 48000 samples, fewer can be decoded; copy it again",
    ),
    "cut.mp3": (
        encoded(TONE, format="MP3")[:-1000],
        f"is {HALF} 16000 samples, fewer can be decoded; copy it again",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_refused_file_has_one_exact_line(tmp_path, name):
    content, line = FILES[name]
    path = str(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError) as by_path:
        audio.read(path, rate_hz=RATE)
    with pytest.raises(AudioError) as by_bytes:
        audio.read(content, rate_hz=RATE)
    assert str(by_path.value) == f"{path!r} {line}"
    assert str(by_bytes.value) == f"the audio {line}"


def test_a_file_that_is_called_raw_is_refused(tmp_path):
    TONE.tofile(tmp_path / "a.raw")
    path = str(tmp_path / "a.raw")
    with pytest.raises(AudioError) as error:
        audio.read(path, rate_hz=RATE)
    assert str(error.value) == f"{path!r} is not audio (samples without a header); {USE}"


ADVICE = "give the path of an audio file"
PATHS = {
    "missing.wav": f"does not exist; {ADVICE}",
    "folder": f"is a folder; {ADVICE}",
    "pipe": f"is not a regular file; {ADVICE}",
    "a" * 300: "cannot be read (File name too long); choose another file",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_refused_path_has_one_exact_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / name)
    with pytest.raises(AudioError) as error:
        audio.read(path, rate_hz=RATE)
    assert str(error.value) == f"{path!r} {PATHS[name]}"


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.wav").write_bytes(encoded(TONE, format="WAV"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(AudioError) as error:
        audio.read(str(tmp_path / "mine.wav"), rate_hz=RATE)
    path = str(tmp_path / "mine.wav")
    assert str(error.value) == f"{path!r} cannot be read (no permission); choose another file"


GOOD = np.zeros(8000, np.float32)
RATES = "allowed: 4000 to 192000 Hz, a whole number"
ARRAYS = [
    (GOOD, None, "an array does not tell its rate; give sample_rate_hz="),
    (GOOD, 3_999, f"the array has a rate of 3999; {RATES}"),
    (GOOD, 192_001, f"the array has a rate of 192001; {RATES}"),
    (GOOD, 16_000.0, f"the array has a rate of 16000.0; {RATES}"),
    (GOOD, True, f"the array has a rate of True; {RATES}"),
    (GOOD[:0], RATE, "the array holds 0 samples; record or copy it again"),
    (
        GOOD[:4000],
        RATE,
        "the array is 0.25 s long (4000 samples at 16000 Hz); allowed: 0.4 s or more",
    ),
    (
        GOOD.astype(np.uint8),
        RATE,
        "the array is of uint8; allowed: int16, int32, float32, float64",
    ),
    (
        GOOD.astype(complex),
        RATE,
        "the array is of complex128; allowed: int16, int32, float32, float64",
    ),
    (
        np.zeros((2, 8000)),
        RATE,
        "the array has shape (2, 8000), which looks like (channels, samples); "
        "allowed: (samples, channels), so give array.T",
    ),
    (np.zeros((8000, 9)), RATE, "the array has 9 channels; allowed: 1 to 8"),
    (np.zeros((8000, 0)), RATE, "the array has 0 channels; allowed: 1 to 8"),
    (
        np.zeros((1, 8000, 1)),
        RATE,
        "the array has shape (1, 8000, 1); allowed: (samples,) or (samples, channels)",
    ),
    (
        np.array(0.0),
        RATE,
        "the array has shape (); allowed: (samples,) or (samples, channels)",
    ),
    (
        np.where(np.arange(8000) == 7000, np.inf, 0),
        RATE,
        "the array has NaN or infinity at sample 7000; allowed: finite values",
    ),
    (
        np.where(np.arange(80_000) == 70_000, np.nan, 0),
        RATE,
        "the array has NaN or infinity at sample 70000; allowed: finite values",
    ),
    (
        np.full(8000, 1e300),
        RATE,
        "the array has NaN or infinity at sample 0; allowed: finite values",
    ),
    (
        np.tile([np.inf, -np.inf], (8000, 1)),
        RATE,
        "the array has NaN or infinity at sample 0; allowed: finite values",
    ),
    (
        [0.0] * 8000,
        RATE,
        "audio is a list; allowed: a path, the bytes of a file, or an array",
    ),
    ("clip.wav", RATE, "sample_rate_hz is 16000; only an array needs it"),
    (b"RIFF", RATE, "sample_rate_hz is 16000; only an array needs it"),
]


@pytest.mark.parametrize(("array", "rate", "line"), ARRAYS, ids=[line for *_, line in ARRAYS])
def test_a_refused_array_has_one_exact_line(array, rate, line):
    with pytest.raises(AudioError) as error:
        audio.read(array, rate, rate_hz=RATE)
    assert str(error.value) == line
