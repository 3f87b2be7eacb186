"""The live loop: samples from a pipe, answers as they come.

It has the clock that a `Stream` has not. Nothing is skipped: where the engine is slower than the
audio, the pipe fills and whoever writes to it waits, or tells of an overrun as ``arecord`` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from edge_ser.audio import Samples
from edge_ser.errors import AudioError
from edge_ser.prediction import StreamEvent
from edge_ser.recognizer import Recognizer
from edge_ser.service import notify
from edge_ser.stream import Stream

_BYTES = 1 << 12  # read at most at once: 128 ms at 16 kHz
_FILES = (b"RIFF", b"fLaC", b"OggS", b"FORM", b".snd")  # what `predict` is for
_NEEDED = "needed is signed 16-bit little-endian PCM, one channel, no header"


def listen(recognizer: Recognizer, source: BinaryIO) -> Iterator[tuple[StreamEvent, float]]:
    """Yield the answer for every window, and how long after its last sample it came, in ms.

    systemd, where it has started this, is told when the engine is ready, of every answer, and of
    the end.

    Args:
        recognizer: Answers.
        source: See `pcm_blocks`.

    Raises:
        AudioError: The source is a file, or ends within a sample, or within 0.4 s.
        EngineError: The graph failed.
    """
    metadata, stream = recognizer.metadata, Stream(recognizer)
    window = round(metadata.window_s * metadata.sample_rate_hz)
    recognizer.engine.run(np.zeros((1, window), np.float32))  # the first run is a slow one
    notify("READY=1")
    for block in pcm_blocks(source):
        arrived = time.perf_counter()
        for event in stream.push(block):
            notify("WATCHDOG=1")
            yield event, (time.perf_counter() - arrived) * 1e3
    notify("STOPPING=1")
    arrived = time.perf_counter()
    for event in stream.finish():
        yield event, (time.perf_counter() - arrived) * 1e3


def pcm_blocks(source: BinaryIO) -> Iterator[Samples]:
    """Yield raw audio as it arrives: float32 (n,), -1 to 1 (1 excluded).

    Args:
        source: Signed 16-bit little-endian samples, one channel, no header.

    Raises:
        AudioError: It is a file, or ends within a sample.
    """
    read = getattr(source, "read1", source.read)  # what is there, not as much as was asked for
    left, begun = b"", False
    while data := read(_BYTES):
        if not begun and data.startswith(_FILES):
            raise AudioError(f"the audio begins with {data[:4]!r}, as a file does; {_NEEDED}")
        begun, data = True, left + data
        whole = len(data) // 2 * 2
        left = data[whole:]
        yield np.frombuffer(data[:whole], "<i2").astype(np.float32) * np.float32(2.0**-15)
    if left:
        raise AudioError(f"the audio ended within a sample; {_NEEDED}")
