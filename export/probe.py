"""What flows through a graph on speech: the values of any of its tensors, and the labels."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

Floats = npt.NDArray[np.float32]


def tensor_values(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Floats]
) -> Iterator[dict[str, Floats]]:
    """Yield the values of tensors, by name, for one window after the other.

    Args:
        model: With its weights inside; left as it is.
        names: Of tensors that some node of the graph computes; none yields nothing.
        windows: Speech, each of shape (T,).
    """
    if not names:
        return
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for window in windows:
        values = session.run(list(names), {"samples": window[None]})
        yield dict(zip(names, values, strict=True))


def labels_equal(one: Path, other: Path, windows: Sequence[Floats]) -> float:
    """Return the share of windows that two graphs give the same label."""
    answers = []
    for file in (one, other):
        options = onnxruntime.SessionOptions()
        if file.stem.endswith("_fp16"):
            # The optimizer of ONNX Runtime 1.32 gets convolutions between Q/DQ with half scales
            # wrong, by half of a logit; without it the answers are those of onnx.reference.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        logits = [session.run(["logits"], {"samples": window[None]})[0] for window in windows]
        answers.append(np.concatenate(logits).argmax(axis=1))
    return float((answers[0] == answers[1]).mean())
