"""Q/DQ graphs: which layers are INT8, the two forms of their activations, and their file."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.probe import computing

QUANTIZED = ("Conv", "Gemm", "MatMul")
WEIGHTS = "model_int8.bin"

FRONT_END = "front end"
ONE_CHANNEL = "one channel in"
ACTIVATIONS = "product of activations"
LAST = "gives the logits"


def float_nodes(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the Conv, Gemm and MatMul nodes that stay float, and why.

    The log-mel front end spans more decades than 8 bits hold, and so do raw samples. A convolution
    with a single input channel hears these, or a channel each, which INT8 does not make faster.
    Products of two activations are the attention, whose probabilities shrink with the length of the
    window. The last layers give the logits, and cost nothing.
    """
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    front_end = {name for name in constants if ".mel." in name}
    producers = {output: node for node in graph.node for output in node.output}
    kept = {}
    for node in graph.node:
        if node.op_type not in QUANTIZED:
            continue
        if front_end & set(node.input):
            kept[node.name] = FRONT_END
        elif node.input[1] not in constants:
            kept[node.name] = ACTIVATIONS
        elif node.op_type == "Conv" and constants[node.input[1]][1] == 1:
            kept[node.name] = ONE_CHANNEL
    return kept | {node.name: LAST for node in _last_layers(producers, "logits")}


def _last_layers(producers: Mapping[str, onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Return the layers whose sum is an output."""
    node = producers[output]
    if node.op_type in QUANTIZED:
        return [node]
    return [
        layer for name in node.input if name in producers for layer in _last_layers(producers, name)
    ]


def as_float(
    int8: onnx.ModelProto, exact: onnx.ModelProto, layers: Collection[str]
) -> onnx.ModelProto:
    """Return a copy of a Q/DQ graph in which some layers are not rounded.

    Args:
        int8: The Q/DQ graph.
        exact: The graph that it was made of; nodes and tensors have the same names.
        layers: Names of quantized nodes.
    """
    model = onnx.ModelProto.FromString(int8.SerializeToString())
    graph = model.graph
    before = {node.name: node for node in exact.graph.node}
    constants = {tensor.name: tensor for tensor in exact.graph.initializer}
    there = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.name in layers:
            weight, bias = before[node.name].input[1], bias_and_output(graph, node, there)[0]
            node.input[:] = before[node.name].input
            if weight not in there:
                graph.initializer.append(constants[weight])
            if bias:
                there[bias].CopyFrom(constants[bias])
    give_unrounded(graph, {node.output[0] for node in graph.node if node.name in layers})
    return model


def with_float_sums(int8: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """Return a copy of a Q/DQ graph in which some layers multiply float values.

    Their weights stay INT8, and the file grows by nothing. A GPU is fast at that; for processors
    see `export.twice`.

    Args:
        int8: The Q/DQ graph.
        layers: Names of quantized nodes.
    """
    model = onnx.ModelProto.FromString(int8.SerializeToString())
    sources = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name in layers:
            node.input[0] = sources[sources[node.input[0]].input[0]].input[0]
    give_unrounded(model.graph, {n.output[0] for n in model.graph.node if n.name in layers})
    return model


def give_unrounded(graph: onnx.GraphProto, tensors: Collection[str]) -> None:
    """Let nodes but quantized layers read tensors as they are, in place."""
    sources = {output: node for node in graph.node for output in node.output}
    behind = {}  # what follows the rounding of such a tensor, and the tensor
    for node in graph.node:
        if _is(node, "Dequantize") and node.input[0] in sources:
            rounded = sources[node.input[0]].input[0]
            if rounded in tensors:
                behind[node.output[0]] = rounded
    for node in graph.node:
        weight = sources.get(node.input[1]) if node.op_type in QUANTIZED else None
        if weight is None or not _is(weight, "Dequantize"):
            node.input[:] = [behind.get(name, name) for name in node.input]
    drop_unused(graph)


def _is(node: onnx.NodeProto, operation: str) -> bool:
    return bool(node.op_type == f"{operation}Linear")


def unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose quantized activations are uint8 with zero point 128.

    Every integer moves up by 128 and so does the zero point, so each stands for the same number.
    Whole steps that are subtracted before the rounding are subtracted by its zero point; only what
    lies so near to the middle of a step that float32 decides may be rounded the other way then.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    _widen_weights(graph)
    weights = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims}
    zero = "zero_point_128"
    graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), zero))
    for node in graph.node:
        if _is(node, "Quantize") or (_is(node, "Dequantize") and node.input[0] not in weights):
            node.input[2] = zero
    _subtract_by_zero_points(graph)
    drop_unused(graph)
    return model


def _subtract_by_zero_points(graph: onnx.GraphProto) -> None:
    """Let QuantizeLinear do what a Sub before it does, in place; what follows stays as it is."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    subtracting = {n.output[0]: n for n in graph.node if n.op_type == "Sub"}
    for node in graph.node:
        before = subtracting.get(node.input[0]) if _is(node, "Quantize") else None
        if before is None:
            continue
        tensor, subtracted = before.input
        if subtracted not in constants or constants[subtracted].dims:
            continue
        step = numpy_helper.to_array(constants[node.input[1]])
        middle = 128 - numpy_helper.to_array(constants[subtracted]) / step
        if middle == np.round(middle) and 0 <= middle <= 255:
            zero = f"{node.name}_zero_point"
            graph.initializer.append(numpy_helper.from_array(np.array(middle, np.uint8), zero))
            node.input[0], node.input[2] = tensor, zero


def _widen_weights(graph: onnx.GraphProto) -> None:
    """Let layers that multiply float values read weights that are widened, in place.

    ONNX Runtime does that once, when it opens the graph. Of a DequantizeLinear it would make a
    product of 8-bit blocks, which is slower and rounds the values after all.
    """
    sources = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        scaled = sources.get(node.input[1]) if node.op_type in QUANTIZED else None
        values = sources.get(node.input[0])
        if scaled is None or not _is(scaled, "Dequantize"):
            continue
        if values is not None and _is(values, "Dequantize"):
            continue
        weight, scale = scaled.input[0], numpy_helper.to_array(constants[scaled.input[1]])
        axis = next((part.i for part in scaled.attribute if part.name == "axis"), 1)
        shape = np.ones(len(constants[weight].dims), int)
        shape[axis] = -1
        wide, integers, factor = (f"{weight}_{part}" for part in ("wide", "integers", "factor"))
        graph.initializer.append(numpy_helper.from_array(scale.reshape(shape), factor))
        added = [
            helper.make_node("Cast", [weight], [integers], integers, to=TensorProto.FLOAT),
            helper.make_node("Mul", [integers, factor], [wide], wide),
        ]
        for one in added:
            graph.node.insert(list(graph.node).index(node), one)
        node.input[1] = wide


def bias_and_output(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]
) -> tuple[str | None, str]:
    """Return the constant that is added to a layer's output, and the tensor behind the sum."""
    if node.op_type in ("Conv", "Gemm"):
        return (node.input[2] if len(node.input) > 2 else None), node.output[0]
    readers = [reader for reader in graph.node if node.output[0] in reader.input]
    if len(readers) == 1 and readers[0].op_type == "Add":
        bias = next((name for name in readers[0].input if name in constants), None)
        return bias, readers[0].output[0]
    return None, node.output[0]


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove, in place, the nodes and constants that no output depends on."""
    nodes = computing(graph, [value.name for value in graph.output])
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def save_with_shared_weights(models: Mapping[Path, onnx.ModelProto], least: int = 1024) -> None:
    """Write graphs whose large tensors lie once, for all of them, in `WEIGHTS` beside them.

    The graphs are left as they are.

    Args:
        models: Graph by file; all files in one folder. Tensors of one name must be equal.
        least: Smaller tensors stay inside, in bytes.
    """
    places: dict[str, tuple[int, bytes]] = {}
    folder = next(iter(models)).parent
    with (folder / WEIGHTS).open("wb") as stream:
        for file, whole in models.items():
            model = onnx.ModelProto.FromString(whole.SerializeToString())
            for tensor in model.graph.initializer:
                raw = numpy_helper.to_array(tensor).tobytes()
                if len(raw) < least:
                    continue
                if tensor.name not in places:
                    places[tensor.name] = (stream.tell(), raw)
                    stream.write(raw)
                offset, stored = places[tensor.name]
                if stored != raw:
                    raise ValueError(f"two graphs hold different values of {tensor.name}")
                kind, dims, name = tensor.data_type, list(tensor.dims), tensor.name
                tensor.Clear()
                tensor.name, tensor.data_type = name, kind
                tensor.dims.extend(dims)
                tensor.data_location = TensorProto.EXTERNAL
                entries = {"location": WEIGHTS, "offset": offset, "length": len(raw)}
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=str(value))
            file.write_bytes(model.SerializeToString())
    for file in models:
        onnx.checker.check_model(str(file))  # by path: only so does it find the weights
