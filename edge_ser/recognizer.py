"""The recognizer: from audio to a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_ser import audio as audio_input
from edge_ser.audio import Audio, Samples
from edge_ser.bundle import ADAPTATION, Bundle, Metadata
from edge_ser.engines.base import Engine
from edge_ser.errors import BundleError, EngineError
from edge_ser.prediction import Prediction, Window
from edge_ser.windows import windows

if TYPE_CHECKING:
    from edge_ser.speaker import Speaker


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

    def __init__(self, metadata: Metadata, engine: Engine, bundle: Bundle | None = None) -> None:
        """Hold an engine that runs a graph with these labels; most users want `load`.

        Args:
            metadata: Of the model.
            engine: Runs its graph.
            bundle: Where the graph came from; `adapt` needs it.
        """
        self.metadata = metadata
        self.engine = engine
        self._bundle = bundle

    @classmethod
    def load(
        cls,
        bundle: str | Path = "default",
        *,
        engine: str = "onnx",
        precision: str = "int8",
        threads: int | None = None,
        device: str = "cpu",
        fallback: str | None = None,
    ) -> Recognizer:
        """Open a bundle and the graph in it that suits this machine.

        Args:
            bundle: The name of an embedded bundle (``"default"``, ``"tiny"``), or a folder.
            engine: ``"onnx"``, or ``"tensorrt"`` on a GPU of NVIDIA.
            precision: ``"int8"`` or ``"fp32"``; on a GPU also ``"fp16"``.
            threads: How many threads compute, 1 or more; None means one for each core.
            device: Of ONNX Runtime: ``"cpu"``, ``"cuda"`` (no INT8) or ``"tensorrt"``.
            fallback: ``"onnx"``: where TensorRT fails, the processor goes on, and the log says so.

        Raises:
            BundleError: The bundle is missing, damaged, or contradicts itself.
            DeviceError: The device is not there, or does not run this precision.
            EngineError: The engine fails to start, or this machine does not compute rightly.
            MissingDependency: ONNX Runtime or TensorRT is not installed.
        """
        from edge_ser.engines import open_engine

        opened = Bundle.open(bundle)
        chosen = open_engine(
            opened, engine=engine, precision=precision, threads=threads, device=device,
            fallback=fallback,
        )  # fmt: skip
        return cls(opened.metadata, chosen, opened)

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
        return self.answer(*self.run(audio, sample_rate_hz))

    def adapt(self, history: str | Path | None = None) -> Speaker:
        """Return a recognizer for one speaker, which learns from every utterance it predicts.

        Example:
            >>> speaker = Recognizer.load().adapt()
            >>> for clip in ("first.wav", "second.wav"):
            ...     print(speaker.predict(clip).label)
            >>> speaker.save("anna.json")

        Args:
            history: What `Speaker.save` wrote, to go on with; None begins anew.

        Raises:
            BundleError: The bundle cannot adapt, or the history is not one of this model.
        """
        from edge_ser.adaptation import Adaptation
        from edge_ser.speaker import Speaker

        advice = "it cannot adapt to a speaker; use predict"
        if self._bundle is None:
            raise BundleError(f"{self.metadata.name!r} was not loaded from a bundle; {advice}")
        adaptation = Adaptation.read(self._bundle.file(ADAPTATION, advice))
        made_by = self.metadata.files[ADAPTATION].sha256
        return Speaker(self, adaptation, made_by, Path(history) if history is not None else None)

    def answer(
        self, spans: Sequence[tuple[float, float]], logits: NDArray[np.floating]
    ) -> Prediction:
        """Return the prediction from what `run` returned.

        Args:
            spans: Start and end of the W windows in seconds.
            logits: Shape (W, C).
        """
        window_probs = probabilities(logits, self.metadata.temperature)
        clip_probs = window_probs.mean(axis=0)
        windows = tuple(
            Window(start_s, end_s, *self._best(probs))
            for (start_s, end_s), probs in zip(spans, window_probs, strict=True)
        )
        label, confidence, probs = self._best(clip_probs)
        return Prediction(
            label=label,
            confidence=confidence,
            uncertain=confidence < self.metadata.abstain_below,
            probs=probs,
            windows=windows,
            device=self.engine.device,
            graph=self.engine.graph,
        )

    def run(
        self, audio: Audio, sample_rate_hz: int | None = None
    ) -> tuple[list[tuple[float, float]], NDArray[np.float32]]:
        """Return start and end in seconds of the W windows of a clip, and their raw logits (W, C).

        Arguments and errors are those of `predict`, which is `answer` of this.
        """
        rate = self.metadata.sample_rate_hz
        window, hop = round(self.metadata.window_s * rate), round(self.metadata.hop_s * rate)
        spans, logits = [], []
        blocks = audio_input.blocks(audio, sample_rate_hz, rate_hz=rate)
        for start, samples in windows(blocks, window, hop):
            logits.append(self.run_window(samples))
            spans.append((start / rate, (start + len(samples)) / rate))
        return spans, np.array(logits)

    def run_window(self, samples: Samples) -> NDArray[np.float32]:
        """Return the raw logits (C,) of one window, float32 (T,) at the bundle's rate, T >= 0.4 s.

        Raises:
            EngineError: The graph failed.
        """
        logits: NDArray[np.float32] = self.engine.run(samples[np.newaxis])[0]  # (1, T) -> (C,)
        if not np.isfinite(logits).all():
            graph = self.engine.graph
            raise EngineError(
                f"{graph} returned NaN or infinity; is the audio far louder than 1.0?"
            )
        return logits

    def _best(self, probs: NDArray[np.float64]) -> tuple[str, float, dict[str, float]]:
        """Return the label, its probability, and all of them by label."""
        values = probs.tolist()
        best = int(probs.argmax())
        labels = self.metadata.labels
        return labels[best], values[best], dict(zip(labels, values, strict=True))


def probabilities(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Return softmax(logits / temperature) over the last axis, float64."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))  # the largest is 1: no overflow
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
