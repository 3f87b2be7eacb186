"""The recognizer: from audio to a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_ser import audio as audio_input
from edge_ser.audio import Audio, Samples
from edge_ser.bundle import Bundle, Metadata
from edge_ser.engines.base import Engine
from edge_ser.errors import EngineError
from edge_ser.prediction import Prediction, Window


class Recognizer:
    """Tells the emotion of speech.

    Example:
        >>> from edge_ser import Recognizer
        >>> recognizer = Recognizer.load("tiny")
        >>> prediction = recognizer.predict("clip.wav")
        >>> print(prediction.label, prediction.confidence)

    Attributes:
        metadata: Labels, rate, windows and calibration of the bundle.
        engine: What runs its graph.
    """

    def __init__(self, metadata: Metadata, engine: Engine) -> None:
        """Hold an engine that runs a graph with these labels; most users want `load`."""
        self.metadata = metadata
        self.engine = engine

    @classmethod
    def load(
        cls,
        bundle: str | Path = "default",
        *,
        precision: str = "int8",
        threads: int | None = None,
        device: str = "cpu",
    ) -> Recognizer:
        """Open a bundle and the graph in it that suits this machine.

        Args:
            bundle: The name of an embedded bundle (``"default"``, ``"tiny"``), or a folder.
            precision: ``"int8"`` or ``"fp32"``.
            threads: How many threads compute, 1 or more; None means one for each core.
            device: ``"cpu"``, or ``"cuda"`` (fp32 only).

        Raises:
            BundleError: The bundle is missing, damaged, or contradicts itself.
            DeviceError: The device is not there, or does not run this precision.
            EngineError: This processor does not compute the graph rightly.
            MissingDependency: ONNX Runtime is not installed.
        """
        from edge_ser.engines import open_engine

        opened = Bundle.open(bundle)
        engine = open_engine(opened, precision=precision, threads=threads, device=device)
        return cls(opened.metadata, engine)

    def predict(self, audio: Audio, sample_rate_hz: int | None = None) -> Prediction:
        """Return the emotion of a clip.

        Args:
            audio: The path of a file, the bytes of one, or an array: int16, int32, float32 or
                float64, of shape (samples,) or (samples, channels). At least 0.4 s.
            sample_rate_hz: The rate of an array; a file tells its own.

        Raises:
            AudioError: The audio is refused.
            EngineError: The graph failed.
        """
        spans, logits = self._run(audio, sample_rate_hz)
        window_probs = probabilities(logits, self.metadata.temperature)
        clip_probs = window_probs.mean(axis=0)
        windows = tuple(
            Window(start_s, end_s, *self._answer(probs))
            for (start_s, end_s), probs in zip(spans, window_probs, strict=True)
        )
        label, confidence, probs = self._answer(clip_probs)
        return Prediction(
            label=label,
            confidence=confidence,
            uncertain=confidence < self.metadata.abstain_below,
            probs=probs,
            windows=windows,
            device=self.engine.device,
            graph=self.engine.graph,
        )

    def logits(self, audio: Audio, sample_rate_hz: int | None = None) -> NDArray[np.float32]:
        """Return the raw logits of the windows of a clip, float32 of shape (W, C).

        `predict` returns the mean over W of `probabilities` of them. Arguments and errors are those
        of `predict`.
        """
        return self._run(audio, sample_rate_hz)[1]

    def _run(
        self, audio: Audio, sample_rate_hz: int | None
    ) -> tuple[list[tuple[float, float]], NDArray[np.float32]]:
        """Return start and end in seconds, and the logits, of every window."""
        rate = self.metadata.sample_rate_hz
        window, hop = round(self.metadata.window_s * rate), round(self.metadata.hop_s * rate)
        spans, logits = [], []
        blocks = audio_input.blocks(audio, sample_rate_hz, rate_hz=rate)
        for start, samples in windows(blocks, window, hop):
            logits.append(self.engine.run(samples[np.newaxis])[0])  # (1, T) -> (C,)
            spans.append((start / rate, (start + len(samples)) / rate))
        stacked = np.array(logits)
        if not np.isfinite(stacked).all():
            graph = self.engine.graph
            raise EngineError(
                f"{graph} returned NaN or infinity; is the audio far louder than 1.0?"
            )
        return spans, stacked

    def _answer(self, probs: NDArray[np.float64]) -> tuple[str, float, dict[str, float]]:
        """Return the label, its probability, and all of them by label."""
        values = probs.tolist()
        best = int(probs.argmax())
        labels = self.metadata.labels
        return labels[best], values[best], dict(zip(labels, values, strict=True))


def windows(blocks: Iterable[Samples], window: int, hop: int) -> Iterator[tuple[int, Samples]]:
    """Yield the windows of a clip that arrives in blocks of any size, each with its first sample.

    They start at 0, hop, 2 hop, ... until one reaches the end; that one may be shorter. All sizes
    are in samples.
    """
    start, held = 0, np.empty(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block]) if len(held) else block
        while len(held) > window:  # more follows, so this window is not the last
            yield start, held[:window]
            start, held = start + hop, held[hop:]
    yield start, held


def probabilities(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Return softmax(logits / temperature) over the last axis, float64."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))  # the largest is 1: no overflow
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
