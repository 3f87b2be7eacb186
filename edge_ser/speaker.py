"""A recognizer for one speaker: it learns from what it hears, and from nothing that follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_ser.adaptation import Adaptation, History, read_history, write_history
from edge_ser.audio import Audio
from edge_ser.errors import AudioError
from edge_ser.prediction import Prediction

if TYPE_CHECKING:
    from edge_ser.recognizer import Recognizer


class Speaker:
    """One speaker, as far as he was heard; made by `Recognizer.adapt`.

    Attributes:
        history: What is kept of the utterances: a few sums, never audio.
    """

    def __init__(
        self, recognizer: Recognizer, adaptation: Adaptation, made_by: str, file: Path | None
    ) -> None:
        """Go on with the history in a file, or begin; most users want `Recognizer.adapt`.

        Args:
            recognizer: What answers.
            adaptation: The network of its bundle.
            made_by: SHA-256 of that network's file.
            file: As `save` wrote it.

        Raises:
            BundleError: The file is no history, or another model's.
        """
        self._recognizer, self._adaptation, self._made_by = recognizer, adaptation, made_by
        labels = recognizer.metadata.labels
        self.history = read_history(file, made_by, labels) if file else History.empty(len(labels))

    def predict(self, audio: Audio, sample_rate_hz: int | None = None) -> Prediction:
        """Return the emotion of an utterance in the light of the earlier ones, then remember it.

        Arguments and errors are those of `Recognizer.predict`; audio that is refused is not
        remembered. Give it speech of this speaker alone, each utterance once.
        """
        temperature = self._recognizer.metadata.temperature
        spans, logits = self._recognizer.run(audio, sample_rate_hz)
        shifted = logits + self._adaptation.shift(self.history) * temperature
        self.history.add(logits.mean(axis=0) / temperature)
        return self._recognizer.answer(spans, shifted)

    def reset(self) -> None:
        """Forget the speaker."""
        self.history = History.empty(len(self._recognizer.metadata.labels))

    def save(self, file: str | Path) -> None:
        """Write the history, for `Recognizer.adapt` to go on with: numbers, 1 kB, no audio.

        Raises:
            AudioError: The file cannot be written.
        """
        try:
            write_history(self.history, Path(file), self._made_by)
        except OSError as exc:
            line = f"{str(file)!r} cannot be written ({exc.strerror}); name another place"
            raise AudioError(line) from exc
