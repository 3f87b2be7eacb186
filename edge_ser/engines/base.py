"""The one seam of the runtime: whatever turns samples into logits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """Runs one graph on one device."""

    @property
    def device(self) -> str:
        """What computes, e.g. ``"cpu"``."""
        ...

    @property
    def graph(self) -> str:
        """What is computed, e.g. ``"model_int8_x86.onnx"``."""
        ...

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of windows.

        Args:
            samples: float32 of shape (N, T), mono, at the bundle's rate, T >= 0.4 s.

        Returns:
            float32 of shape (N, C), C in the order of the bundle's labels.

        Raises:
            EngineError: The backend failed.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; it cannot run afterwards."""
        ...
