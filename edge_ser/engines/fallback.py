"""An engine that hands over to another when it fails, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_ser.engines.base import Engine
from edge_ser.errors import EdgeSerError, EngineError

_LOG = logging.getLogger("edge_ser")


class FallbackEngine:
    """Runs an engine until it fails to start or to run, from then on another.

    What computes is always told: in the log when it changes, and by `device` and `graph`.
    """

    def __init__(self, first: Callable[[], Engine], second: Callable[[], Engine]) -> None:
        """Open the first engine, or else the second.

        Args:
            first: Opens it.
            second: Opens the other, when it is needed.

        Raises:
            EdgeSerError: The second one does not open either.
        """
        self._second: Callable[[], Engine] | None = second
        try:
            self._engine = first()
        except EdgeSerError as exc:
            self._hand_over(exc)

    def _hand_over(self, error: EdgeSerError) -> None:
        assert self._second
        self._engine, self._second = self._second(), None
        _LOG.warning(f"{error}; from now on {self.graph} runs on {self.device}")

    @property
    def device(self) -> str:
        """What computes now."""
        return self._engine.device

    @property
    def graph(self) -> str:
        """What is computed now."""
        return self._engine.graph

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of windows, by the second engine if the first fails; see `Engine`."""
        try:
            return self._engine.run(samples)
        except EngineError as exc:
            if self._second is None:
                raise
            try:
                self._engine.close()
            except EngineError:
                pass  # it is lost; what matters was said by the first error
            self._hand_over(exc)
            return self._engine.run(samples)

    def close(self) -> None:
        """Release what computes now; see `Engine`."""
        self._engine.close()
