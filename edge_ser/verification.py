"""What ``edge-ser verify`` checks: is a bundle whole, and does this machine compute it rightly?"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_ser.bundle import GPU_GRAPHS, Bundle
from edge_ser.engines import open_engine
from edge_ser.engines.base import Engine
from edge_ser.errors import AudioError, EdgeSerError, EngineError
from edge_ser.prediction import Prediction
from edge_ser.recognizer import Recognizer
from edge_ser.selftest import TOLERANCE, deviation

LABELS_EQUAL = 0.98
"""Share of a user's clips that must keep their label; what the certificate asks of INT8."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        check: Its name.
        ok: Whether it holds.
        detail: What was found.
        error: What kept it from being made.
    """

    check: str
    ok: bool
    detail: str
    error: EdgeSerError | None = field(default=None, repr=False)


def verify(
    name: str | Path, engine: str = "onnx", manifest: str | Path | None = None
) -> Iterator[Check]:
    """Check a bundle; the first check that cannot be made is the last.

    Args:
        name: As `Bundle.open` takes it.
        engine: ``"onnx"`` or ``"tensorrt"``.
        manifest: CSV of clips with the column ``path``, from its own folder, and ``emotion`` where
            that is known: asked of the engine, and of ONNX Runtime.
    """
    check = "hashes"
    try:
        bundle = Bundle.open(name)
        present = [file for file in bundle.metadata.files if (bundle.path / file).exists()]
        yield Check(check, True, f"{len(present)} files of {str(bundle.path)!r}")
        precisions = ["int8", "fp32"] if engine == "onnx" else list(GPU_GRAPHS)
        for precision in precisions:
            if precision != "int8" and not {*GPU_GRAPHS[precision]} & {*present}:
                continue
            check = f"labels {precision}"
            try:
                opened = _open(bundle, engine, precision)
            except EngineError:  # without VNNI it is the self-test that decides what is opened
                check = f"self-test {precision}"
                raise
            yield Check(check, True, ", ".join(bundle.metadata.labels))
            check = f"self-test {precision}"
            off = deviation(bundle, opened)
            opened.close()
            detail = (
                f"{opened.graph} is off by {off:.2g} of the largest logit (allowed: {TOLERANCE:g})"
            )
            yield Check(check, off <= TOLERANCE, detail)
        if manifest is not None:
            check = "clips"
            yield from _clips(bundle, engine, Path(manifest))
    except EdgeSerError as exc:
        yield Check(check, False, str(exc), exc)


def _open(bundle: Bundle, engine: str, precision: str) -> Engine:
    if engine == "onnx":
        return open_engine(bundle, precision=precision)
    from edge_ser.engines.tensorrt import open_tensorrt

    # The windows of the self-test differ in length, and none may be repeated to fill another.
    return _EachLength(
        bundle.gpu_graph(precision)[0].name,
        lambda samples: open_tensorrt(
            bundle, precision=precision, window_s=samples / bundle.metadata.sample_rate_hz
        ),
    )


class _EachLength:
    """Engines of fixed shape as one: for each length of window one that was built for it."""

    device = "tensorrt"

    def __init__(self, graph: str, open_one: Callable[[int], Engine]) -> None:
        self.graph, self._open_one = graph, open_one

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        engine = self._open_one(samples.shape[1])
        try:
            return engine.run(samples)
        finally:
            engine.close()

    def close(self) -> None:
        """Nothing is held."""


def _clips(bundle: Bundle, engine: str, manifest: Path) -> Iterator[Check]:
    """Ask an engine for the clips of a manifest, and ONNX Runtime on the processor."""
    clips = read_clips(manifest, bundle.metadata.labels)
    asked = Recognizer(bundle.metadata, open_engine(bundle, engine=engine))
    found = [asked.predict(path) for path, _ in clips]
    asked.engine.close()
    emotions = [emotion for _, emotion in clips]
    if any(emotions):
        yield Check("accuracy", True, f"{_accuracy(found, emotions)} ({asked.engine.graph})")
    if engine == "onnx":
        return
    reference = Recognizer(bundle.metadata, open_engine(bundle))
    expected = [reference.predict(path) for path, _ in clips]
    if any(emotions):
        detail = f"{_accuracy(expected, emotions)} ({reference.engine.graph} on the processor)"
        yield Check("accuracy", True, detail)
    equal = np.mean([a.label == b.label for a, b in zip(found, expected, strict=True)])
    apart = np.abs(
        [
            [a.probs[label] - b.probs[label] for label in bundle.metadata.labels]
            for a, b in zip(found, expected, strict=True)
        ]
    )
    yield Check(
        "clips",
        bool(equal >= LABELS_EQUAL),
        f"{equal:.1%} of {len(clips)} clips have the label of the processor (asked: "
        f"{LABELS_EQUAL:.0%}); probabilities differ by {np.median(apart):.2g} (median), "
        f"{apart.max():.2g} (largest)",
    )


def read_clips(manifest: Path, labels: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Return paths and emotions of a manifest; an emotion that is not known is empty.

    Raises:
        AudioError: It cannot be read, or holds no clip, or an emotion that is no label.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise AudioError(
            f"manifest {str(manifest)!r} cannot be read ({why}); needed is a CSV file with a "
            "column 'path'"
        ) from exc
    if not rows or "path" not in rows[0]:
        raise AudioError(f"manifest {str(manifest)!r} has no clips; needed is a column 'path'")
    for row in rows:
        if (emotion := row.get("emotion")) and emotion not in labels:
            raise AudioError(
                f"manifest {str(manifest)!r}: emotion {emotion!r}; allowed: {', '.join(labels)}"
            )
    return [(manifest.parent / row["path"], row.get("emotion") or "") for row in rows]


def _accuracy(found: list[Prediction], emotions: list[str]) -> str:
    """Return unweighted and plain accuracy of the clips whose emotion is known."""
    right = defaultdict(list)
    for prediction, emotion in zip(found, emotions, strict=True):
        if emotion:
            right[emotion].append(prediction.label == emotion)
    each = [one for values in right.values() for one in values]
    recalls = [np.mean(values) for values in right.values()]
    return (
        f"unweighted {np.mean(recalls):.1%} over {len(right)} labels, plain {np.mean(each):.1%} of "
        f"{len(each)} clips"
    )
