"""A bundle with known answers, and a fake engine: all that a test needs of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser.bundle import FP32_GRAPH, INT8_GRAPH, X86_GRAPH, sha256
from edge_ser.metadata import SCHEMA_VERSION, Metadata

WEIGHTS = "model_int8.bin"


def expected_logits(samples: NDArray[np.floating], classes: int) -> NDArray[np.float32]:
    """Return what a graph of `make_bundle` answers: logit i of m = mean(abs) is 8 i m - i².

    So the louder the samples, the later the label: the boundaries lie at m = 1/8, 3/8, 5/8, ...

    Args:
        samples: Shape (T,).
        classes: C.

    Returns:
        float32 of shape (C,).
    """
    i = np.arange(classes)
    return np.asarray(8 * i * np.abs(samples).mean() - i**2, np.float32)


def make_bundle(
    folder: Path,
    *,
    labels: Sequence[str] = ("calm", "lively", "loud"),
    rate: int = 16_000,
    fp32: bool = False,
    **changes: Any,
) -> Path:
    """Write a small but complete bundle whose answers can be computed by hand.

    Its embedding is the mean absolute sample, (N, 1); its logits are `expected_logits`.

    Args:
        folder: Where to write; made if it is not there.
        labels: The labels, two or more.
        rate: The bundle's rate in Hz.
        fp32: Whether to add the optional ``model.onnx``.
        changes: Other values of the metadata, e.g. ``hop_s=1.0``.

    Returns:
        ``folder``.

    Raises:
        BundleError: A value is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    properties = {"labels": list(labels), "sample_rate_hz": rate, "schema_version": SCHEMA_VERSION}
    graphs = [INT8_GRAPH, X86_GRAPH] + [FP32_GRAPH] * fp32
    for name in graphs:
        weights = None if name == FP32_GRAPH else WEIGHTS
        (folder / name).write_bytes(_graph(len(labels), properties, weights))
    (folder / WEIGHTS).write_bytes((8 * np.arange(len(labels), dtype="<f4")).tobytes())
    recorded = {}
    for i, amplitude in enumerate((0.05, 0.5)):
        samples = np.full((i + 1) * rate // 2, amplitude, np.float32)
        recorded[f"samples_{i}"] = samples
        for name in graphs:
            recorded[f"{Path(name).stem}_{i}"] = expected_logits(samples, len(labels))
    np.savez(folder / "selftest.npz", **recorded)  # type: ignore[arg-type]
    (folder / "certificate.json").write_text(
        '{"note": "made by edge_ser.testing, certifies nothing"}\n'
    )
    (folder / "README.md").write_text("A bundle for tests: the louder, the later the label.\n")
    document = {
        "schema_version": SCHEMA_VERSION, "name": folder.name, "labels": list(labels),
        "sample_rate_hz": rate, "window_s": 3.0, "hop_s": 1.5, "temperature": 1.0,
        "abstain_below": 0.0, "certified": True, "encoder": {}, "head": {}, "teacher": None,
        "corpora": [], "tools": {}, **changes,
    }  # fmt: skip
    optional = {FP32_GRAPH, "certificate.json", "README.md"}
    document["files"] = list_files(folder, optional)
    metadata = Metadata.from_json(document)
    (folder / "metadata.json").write_text(json.dumps(metadata.to_json(), indent=1) + "\n")
    return folder


def list_files(folder: Path, optional: set[str]) -> dict[str, dict[str, Any]]:
    """Return the ``files`` of a bundle's metadata: every file in the folder but the metadata."""
    return {
        file.name: {
            "sha256": sha256(file),
            "required": file.name not in optional,
        }
        for file in sorted(folder.iterdir())
        if file.name != "metadata.json"
    }


def _graph(classes: int, properties: dict[str, Any], weights: str | None) -> bytes:
    """Return an ONNX graph of `expected_logits`, its weights inside or in a file beside it."""
    from onnx import TensorProto, helper, numpy_helper

    gain = numpy_helper.from_array(8 * np.arange(classes, dtype=np.float32)[np.newaxis], "gain")
    if weights:
        gain.ClearField("raw_data")
        gain.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights), ("offset", "0"), ("length", str(4 * classes))):
            gain.external_data.add(key=key, value=value)
    bias = numpy_helper.from_array(-(np.arange(classes, dtype=np.float32) ** 2), "bias")
    nodes = [
        helper.make_node("Abs", ["samples"], ["magnitude"]),
        helper.make_node("ReduceMean", ["magnitude"], ["embedding"], axes=[1], keepdims=1),
        helper.make_node("Gemm", ["embedding", "gain", "bias"], ["logits"]),
    ]
    kind = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("samples", kind, ["N", "T"])]
    outputs = [
        helper.make_tensor_value_info("logits", kind, ["N", classes]),
        helper.make_tensor_value_info("embedding", kind, ["N", 1]),
    ]
    graph = helper.make_graph(nodes, "loudness", inputs, outputs, [gain, bias])
    # Opset 17 and IR 8: every ONNX Runtime that the package allows can read them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    return bytes(model.SerializeToString())


class FakeEngine:
    """An engine that returns given logits and keeps what it was given.

    Attributes:
        calls: The samples of every run, each (N, T).
        closed: Whether `close` was called.
    """

    device = "fake"
    graph = "fake.onnx"

    def __init__(self, *logits: Sequence[float]) -> None:
        """Return these logits (C,) in turn, one for each run; the last one for all that follow."""
        self.calls: list[NDArray[np.float32]] = []
        self.closed = False
        self._logits = [np.array(values, np.float32) for values in logits]

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the next logits for every row."""
        logits = self._logits[min(len(self.calls), len(self._logits) - 1)]
        self.calls.append(samples)
        return np.tile(logits, (len(samples), 1))

    def close(self) -> None:
        """Note it."""
        self.closed = True
