"""A user's own ONNX graph, brought to the names that the runtime and the quantizer know."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from export.errors import RecipeError
from export.qdq import QUANTIZED

OPSETS = (17, 22)
"""From the one where LayerNormalization is one node to the last that TensorRT 10.3 reads."""

FORM = "allowed is one float32 input (N, T), samples at 16 kHz, and float32 logits (N, C)"


def adopt(source: Path, labels: Sequence[str], properties: Mapping[str, Any], file: Path) -> None:
    """Write a copy whose input is ``samples`` and whose outputs are ``logits`` and ``embedding``.

    An output called ``embedding`` is kept; a graph without one gets its logits for it.

    Args:
        source: The user's graph; it takes samples as they are and does what else it needs itself.
        labels: What its logits stand for.
        properties: Goes into ``metadata_props``, each value as JSON.
        file: The ONNX file to write.

    Raises:
        RecipeError: It cannot be read, or has another form.
    """
    try:
        model = onnx.load(source)
        onnx.checker.check_model(model)
        model = _with_constant_weights(model)
    except Exception as exc:  # those of protobuf, onnx, ONNX Runtime and the disk share no base
        line = str(exc).partition("\n")[0]
        raise RecipeError(f"{str(source)!r} cannot be read as ONNX ({line})") from exc
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise RecipeError(
            f"{str(source)!r} has opset {opset}; allowed are {OPSETS[0]} to {OPSETS[1]}: export it "
            "again, or use onnx.version_converter"
        )
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    outputs = {value.name: value for value in graph.output}
    logits = outputs.get("logits", graph.output[0])
    if len(inputs) != 1 or _rank(inputs[0]) != 2 or _rank(logits) != 2:
        form = ", ".join(f"{v.name} {_shape(v)}" for v in (*inputs, *graph.output))
        raise RecipeError(f"{str(source)!r} has {form}; {FORM}")
    if any(isinstance(size, int) for size in _shape(inputs[0])):
        raise RecipeError(
            f"{str(source)!r} takes {inputs[0].name} {_shape(inputs[0])} only; export it with both "
            "axes dynamic"
        )
    classes = _shape(logits)[1]
    if classes != len(labels):
        raise RecipeError(
            f"{str(source)!r} has {classes} logits, but there are {len(labels)} labels "
            f"({', '.join(labels)})"
        )
    names = {inputs[0].name: "samples", logits.name: "logits"}
    kept = outputs.get("embedding")
    found = kept is not None and _rank(kept) == 2
    width = _shape(kept)[1] if found else classes
    if not found:
        names["embedding"] = "embedding_inside"
        graph.node.append(
            helper.make_node("Identity", [logits.name], ["features"], name="features")
        )
        names["features"] = "embedding"
    _rename(graph, names)
    del graph.output[:]
    for name, size in (("logits", classes), ("embedding", width)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]))
    for node in graph.node:
        node.ClearField("doc_string")
    helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _with_constant_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with weights that are computed from constants written out.

    Exporters leave transposed weights, merged weight normalization and the like to be computed; a
    quantizer sees no weights there.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    computed = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in QUANTIZED and node.input[1] not in constants
    }
    if not computed:
        return model
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "before.onnx", Path(scratch) / "after.onnx"
        onnx.save(model, before)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Folds constants; the levels above it use operators of its own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(after)
        onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(after)
    used = {node.domain for node in folded.graph.node}  # it names all that it knows
    kept = [one for one in folded.opset_import if one.domain in used]
    del folded.opset_import[:]
    folded.opset_import.extend(kept)
    return folded


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in (*graph.input, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _rank(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    return len(kind.shape.dim) if kind.elem_type == TensorProto.FLOAT else -1


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
