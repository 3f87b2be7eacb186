"""What a recognizer answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """The answer for one window of a clip.

    Attributes:
        start_s: Where the window begins in the clip, in seconds.
        end_s: Where it ends; the last window of a clip may be shorter than the others.
        label: The most probable label.
        confidence: Its probability, 0 to 1.
        probs: The probability of every label; they sum to 1.
    """

    start_s: float
    end_s: float
    label: str
    confidence: float
    probs: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """The answer for a clip.

    Attributes:
        label: The most probable label.
        confidence: Its probability, 0 to 1: the mean over the windows.
        uncertain: Whether the confidence is below the bundle's threshold.
        probs: The probability of every label; they sum to 1.
        windows: The answers that were averaged, in the order of time.
        device: The device that computed it, e.g. ``"cpu"``.
        graph: The graph that computed it, e.g. ``"model_int8_x86.onnx"``.
    """

    label: str
    confidence: float
    uncertain: bool
    probs: dict[str, float]
    windows: tuple[Window, ...]
    device: str
    graph: str

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain dicts and lists, ready for ``json.dumps``."""
        return {**asdict(self), "windows": [asdict(window) for window in self.windows]}


@dataclass(frozen=True)
class StreamEvent:
    """The answer for one window of audio that arrives.

    Attributes:
        start_s: Where the window begins, in seconds of audio since the stream began.
        end_s: Where it ends; only the last one may be shorter than the others.
        label: The most probable label.
        confidence: Its probability, 0 to 1.
        uncertain: Whether the confidence is below the bundle's threshold.
        probs: The probability of every label; they sum to 1.
        device: The device that computed it, e.g. ``"cpu"``.
        graph: The graph that computed it, e.g. ``"model_int8_x86.onnx"``.
    """

    start_s: float
    end_s: float
    label: str
    confidence: float
    uncertain: bool
    probs: dict[str, float]
    device: str
    graph: str

    def to_json(self) -> dict[str, Any]:
        """Return the same as a plain dict, ready for ``json.dumps``."""
        return asdict(self)
