"""What flows through a graph on speech: the values of any of its tensors, and the labels."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from edge_ser.engines.onnx import OnnxEngine
from export.pairs import overflows_here

FLOAT_SUMS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""As the runtime opens graphs: what layers with INT8 weights read as float is not rounded there."""

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
    session = session_of(up_to(model, names))
    for window in windows:
        values = session.run(list(names), {"samples": window[None]})
        yield dict(zip(names, values, strict=True))


def up_to(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the part of a graph that tensors depend on; they are its outputs.

    ONNX Runtime would compute all the rest as well, and hold its weights.
    """
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    graph = part.graph
    graph.name = model.graph.name
    graph.input.extend(model.graph.input)
    graph.node.extend(computing(model.graph, names))
    needed = {name for node in graph.node for name in node.input}
    graph.initializer.extend(one for one in model.graph.initializer if one.name in needed)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return part


def engine_of(graph: Path, threads: int | None = None) -> OnnxEngine:
    """Return an engine whose answers are those of a processor that cuts off no sums."""
    exactly = overflows_here(onnx.load(graph))
    return OnnxEngine(graph, threads=threads, float_arithmetic=exactly)


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session whose answers are those of a processor that cuts off no sums."""
    options = _options(model)
    options.log_severity_level = 3  # it warns of every constant that is not read any more
    # A waiting thread must not burn a core that a training beside it needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _options(model: onnx.ModelProto) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*FLOAT_SUMS)
    if overflows_here(model):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def computing(graph: onnx.GraphProto, names: Collection[str]) -> list[onnx.NodeProto]:
    """Return the nodes that tensors depend on, in their order."""
    needed, nodes = set(names), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    return nodes[::-1]


def labels_equal(one: Path, other: Path, windows: Sequence[Floats]) -> float:
    """Return the share of windows that two graphs give the same label."""
    answers = []
    for file in (one, other):
        options = _options(onnx.load(file))
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
