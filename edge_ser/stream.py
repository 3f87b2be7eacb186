"""Answers while audio arrives. No input, no threads, no clock: these are of whoever pushes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_ser.audio import Samples, is_too_short
from edge_ser.errors import AudioError
from edge_ser.prediction import StreamEvent
from edge_ser.recognizer import Recognizer
from edge_ser.windows import WindowBuffer


class Stream:
    """Audio of one source, from its first sample on.

    Its windows lie where `Recognizer.predict` has them, and are answered alike.

    Example:
        >>> stream = Stream(Recognizer.load())
        >>> for samples in microphone:
        ...     for event in stream.push(samples):
        ...         print(event.end_s, event.label)
    """

    def __init__(self, recognizer: Recognizer) -> None:
        """Begin.

        Args:
            recognizer: Answers; it is not closed.
        """
        self._recognizer = recognizer
        metadata, rate = recognizer.metadata, recognizer.metadata.sample_rate_hz
        self._buffer = WindowBuffer(round(metadata.window_s * rate), round(metadata.hop_s * rate))

    def push(self, samples: Samples) -> Iterator[StreamEvent]:
        """Yield the answers for the windows that new samples complete, often none.

        Args:
            samples: float32 of shape (n,), mono, at the bundle's rate, any n.

        Raises:
            AudioError: They are of another type or shape, or not finite.
            EngineError: The graph failed.
        """
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise AudioError(
                f"the samples are {samples.dtype.name} of shape {samples.shape}; allowed: float32 "
                "of shape (n,), mono"
            )
        if not np.isfinite(samples).all():
            raise AudioError("the samples have NaN or infinity; allowed: finite values")
        for start, window in self._buffer.push(samples):
            yield self._answer(start, window)

    def finish(self) -> Iterator[StreamEvent]:
        """Yield the answer for the end, if some of it was in no window; the stream begins anew.

        Raises:
            AudioError: There was less than 0.4 s of audio in all.
            EngineError: The graph failed.
        """
        rate = self._recognizer.metadata.sample_rate_hz
        for start, window in self._buffer.finish():
            if is_too_short(len(window), rate):
                raise AudioError(
                    f"the stream ended after {len(window) / rate:.2f} s; allowed: 0.4 s or more"
                )
            yield self._answer(start, window)

    def _answer(self, start: int, window: Samples) -> StreamEvent:
        rate = self._recognizer.metadata.sample_rate_hz
        span = (start / rate, (start + len(window)) / rate)
        found = self._recognizer.answer([span], self._recognizer.run_window(window)[np.newaxis])
        return StreamEvent(
            *span, found.label, found.confidence, found.uncertain, found.probs, found.device,
            found.graph,
        )  # fmt: skip
