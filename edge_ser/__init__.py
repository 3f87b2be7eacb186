"""Speech emotion recognition on the device.

Example:
    >>> from edge_ser import Recognizer
    >>> Recognizer.load().predict("clip.wav").label
"""

from edge_ser.errors import (
    AudioError,
    BundleError,
    DeviceError,
    EdgeSerError,
    EngineError,
    MissingDependency,
)
from edge_ser.prediction import Prediction, StreamEvent, Window
from edge_ser.recognizer import Recognizer
from edge_ser.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AudioError",
    "BundleError",
    "DeviceError",
    "EdgeSerError",
    "EngineError",
    "MissingDependency",
    "Prediction",
    "Recognizer",
    "Stream",
    "StreamEvent",
    "Window",
]
