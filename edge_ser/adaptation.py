"""What is kept of a speaker who was heard, and what it changes: a shift of the logits.

One voice sounds sad whatever it says, another one never does. In the logits that shows as a shift
that stays from utterance to utterance. A history is a few sums over them; a small network, the same
for every label, tells from it how much of what was heard is the voice and not the emotion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser.errors import BundleError

MOST = 50
"""Utterances that a history holds, the most that a network was trained with; older ones fade."""

FEATURES = 4

_ARRAYS = ("inner", "outer", "last")

Floats = NDArray[np.float64]


@dataclass
class History:
    """Sums over the utterances of one speaker: their number and size do not grow with time.

    Attributes:
        count: How many utterances, 0 to `MOST`.
        logits: Sum of the centred, calibrated logits, float64 (C,).
        squares: Sum of their squares, float64 (C,).
        probs: Sum of their probabilities, float64 (C,).
    """

    count: int
    logits: Floats
    squares: Floats
    probs: Floats

    @classmethod
    def empty(cls, classes: int) -> History:
        """Return the history of somebody who was not heard yet."""
        return cls(0, np.zeros(classes), np.zeros(classes), np.zeros(classes))

    def add(self, logits: NDArray[np.floating]) -> None:
        """Take in one more utterance.

        Args:
            logits: Calibrated, that is divided by the temperature, shape (C,). Before any shift.
        """
        if self.count == MOST:
            fade = (MOST - 1) / MOST
            self.logits, self.squares = self.logits * fade, self.squares * fade
            self.probs, self.count = self.probs * fade, MOST - 1
        centred = logits - logits.mean(dtype=np.float64)
        powers = np.exp(centred - centred.max())
        self.count += 1
        self.logits = self.logits + centred
        self.squares = self.squares + centred**2
        self.probs = self.probs + powers / powers.sum()

    def features(self) -> Floats:
        """Return what the network sees, (C, `FEATURES`), each of the size of one.

        For every label the mean logit, its standard deviation and its mean probability, and the
        logarithm of the count. At least one utterance must have been heard.
        """
        mean = self.logits / self.count
        spread = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        count = np.full(len(mean), np.log(self.count) / np.log(MOST))
        return np.stack([mean / 3, spread / 3, self.probs / self.count, count], axis=1)


@dataclass(frozen=True)
class Adaptation:
    """The network of a bundle, ``adaptation.json``: two layers of H units and one output a label.

    Attributes:
        inner: Weights (FEATURES, H) and, as its last row, the bias: (FEATURES + 1, H).
        outer: Weights and bias of the second layer, (H + 1, H).
        last: Weights of the output, (H,); without a bias, for it would shift all labels alike.
        half: Utterances after which half of the shift is applied, above 0.

    Raises:
        BundleError: The arrays do not fit each other, or hold something that is no number.
    """

    inner: Floats
    outer: Floats
    last: Floats
    half: float

    def __post_init__(self) -> None:
        units = self.last.shape[0] if self.last.ndim == 1 else 0
        shapes = (self.inner.shape, self.outer.shape)
        finite = all(np.isfinite(a).all() for a in (self.inner, self.outer, self.last))
        if shapes != ((FEATURES + 1, units), (units + 1, units)) or not units or not finite:
            raise BundleError(
                f"an adaptation of shapes {shapes} and {self.last.shape}; allowed: finite numbers "
                f"({FEATURES + 1}, H), (H + 1, H) and (H,)"
            )
        if not 0 < self.half < float("inf"):
            raise BundleError(f"half is {self.half!r}; allowed: a number above 0")

    def shift(self, history: History) -> Floats:
        """Return what to add to calibrated logits, float64 (C,); zeros for an empty history."""
        if not history.count:
            return np.zeros(len(history.logits))
        hidden = np.tanh(history.features() @ self.inner[:-1] + self.inner[-1])  # (C, H)
        hidden = np.tanh(hidden @ self.outer[:-1] + self.outer[-1])
        return np.asarray(hidden @ self.last * (history.count / (history.count + self.half)))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `read` reads."""
        return {f.name: np.asarray(getattr(self, f.name)).tolist() for f in fields(self)}

    @classmethod
    def read(cls, file: Path) -> Adaptation:
        """Read the file of a bundle.

        Raises:
            BundleError: It is not what `to_json` wrote.
        """
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            arrays = {name: np.array(document[name], np.float64) for name in _ARRAYS}
            return cls(**arrays, half=float(document["half"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
            raise BundleError(f"{str(file)!r} is not an adaptation ({exc})") from exc
        except BundleError as exc:
            raise BundleError(f"{str(file)!r}: {exc}") from exc


def read_history(file: Path, made_by: str, labels: Sequence[str]) -> History:
    """Read what `write_history` wrote.

    Args:
        file: The file.
        made_by: SHA-256 of the adaptation that it must belong to.
        labels: Of the model.

    Raises:
        BundleError: It cannot be read, is no history, or another model made it.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BundleError(f"{str(file)!r} cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{str(file)!r} is not JSON, so no speaker's history ({exc})") from exc
    if not isinstance(document, dict) or not {"adaptation", "count"} <= document.keys():
        raise BundleError(f"{str(file)!r} is no speaker's history; allowed: a file that was saved")
    if document["adaptation"] != made_by:
        raise BundleError(f"{str(file)!r} was made by another model; name a new file for this one")
    try:
        sums = [np.array(document[name], np.float64) for name in ("logits", "squares", "probs")]
        count = document["count"]
        valid = type(count) is int and 0 <= count <= MOST
        valid = valid and all(s.shape == (len(labels),) and np.isfinite(s).all() for s in sums)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise BundleError(f"{str(file)!r} was changed: its sums are none; name a new file")
    return History(count, *sums)


def write_history(history: History, file: Path, made_by: str) -> None:
    """Write a history whole or not at all; it holds no audio and no text.

    Raises:
        OSError: It cannot be written.
    """
    document = {"adaptation": made_by, "count": history.count}
    for name in ("logits", "squares", "probs"):
        document[name] = getattr(history, name).tolist()
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
    partial.replace(file)
