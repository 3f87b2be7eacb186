"""Where the windows of audio lie, whether it is all there or still arrives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from edge_ser.audio import Samples


class WindowBuffer:
    """Cuts audio that arrives in blocks of any size into windows at 0, hop, 2 hop, ...

    It holds less than a window and a block.
    """

    def __init__(self, window: int, hop: int) -> None:
        """Begin at sample 0.

        Args:
            window: Samples of a window.
            hop: Samples from the start of one to that of the next, less than ``window``.
        """
        self._window, self._hop = window, hop
        self._start, self._held = 0, np.empty(0, np.float32)

    def push(self, block: Samples) -> Iterator[tuple[int, Samples]]:
        """Yield the windows that a block (n,) completes, each (window,) with its first sample."""
        self._held = np.concatenate([self._held, block]) if len(self._held) else block
        while len(self._held) >= self._window:
            yield self._start, self._held[: self._window]
            self._start, self._held = self._start + self._hop, self._held[self._hop :]

    def finish(self) -> Iterator[tuple[int, Samples]]:
        """Yield the last window, a shorter one, if some samples were in none; begin anew."""
        if not self._start or len(self._held) > self._window - self._hop:
            yield self._start, self._held
        self._start, self._held = 0, np.empty(0, np.float32)


def windows(blocks: Iterable[Samples], window: int, hop: int) -> Iterator[tuple[int, Samples]]:
    """Yield the windows of a clip that arrives in blocks of any size, each with its first sample.

    They start at 0, hop, 2 hop, ... until one reaches the end; that one may be shorter. All sizes
    are in samples.
    """
    buffer = WindowBuffer(window, hop)
    for block in blocks:
        yield from buffer.push(block)
    yield from buffer.finish()
