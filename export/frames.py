"""Convolutions over time as matrix products of frames, in the graph that x86 runs.

A frame is what a kernel covers. Where values are rounded, frames are copied bytes, and ONNX Runtime
multiplies them by INT8 weights several times as fast as it convolves: the second convolution of
Wav2Vec2-base takes 14.1 ms for 3 s of audio, its product 3.7 and its frames 1.8 (one thread, AMX).
The sums of its INT8 convolutions must be rounded; those of a product are float.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from export.nodes import Nodes, attribute, replace

TURNED = [0, 2, 1]  # (N, C, F) to (N, F, C), and back
END = np.iinfo(np.int64).max


def over_time(graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the INT8 convolutions that `multiply_frames` makes products of.

    Padded and dilated ones are among them; those in groups, or over two axes, are not.
    """
    sources = {output: node for node in graph.node for output in node.output}
    rounded = {o: n.input[0] for o, n in sources.items() if n.op_type == "DequantizeLinear"}
    axes = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    return [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and node.input[0] in rounded
        and axes.get(rounded.get(node.input[1], "")) == 3
        and attribute(node, "group", 1) == 1
        and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    ]


def multiply_frames(graph: onnx.GraphProto) -> None:
    """Replace the convolutions of `over_time` by products, in place."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    sources = {output: node for node in graph.node for output in node.output}
    for conv in over_time(graph):
        values, weight = (sources[name] for name in conv.input[:2])
        dims = constants[weight.input[0]].dims
        replace(graph, [conv], _product(graph, conv, values, weight, dims))


def turned_weights(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the constant (O, C, K) of each matrix of weights that `multiply_frames` turned."""
    constants = {tensor.name for tensor in graph.initializer}
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
    reshaped = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Reshape"}
    sources = {name: turned.get(before) for name, before in reshaped.items()}
    return {name: source for name, source in sources.items() if source in constants}


def _product(
    graph: onnx.GraphProto,
    conv: NodeProto,
    values: NodeProto,
    weight: NodeProto,
    dims: Sequence[int],
) -> list[NodeProto]:
    """Return the nodes from rounded values (N, C, T) to what the convolution gave.

    The weights stay as they are stored, (O, C, K), because the signed graph reads the same; ONNX
    Runtime turns them once, when it opens the graph.
    """
    outputs, channels, kernel = dims
    stride, apart = (attribute(conv, name, [1])[0] for name in ("strides", "dilations"))
    nodes = Nodes(graph, conv.name)
    integers, *how = values.input
    if any(pads := attribute(conv, "pads", [0, 0])):
        sides = nodes.constant("sides", [0, 0, pads[0], 0, 0, pads[1]])
        integers = nodes.add("Pad", "padded", integers, sides, how[1])
    frames = nodes.add("Transpose", "turned", integers, perm=TURNED)
    if (kernel, stride) != (1, 1):
        axis, step = nodes.constant("time", [1]), nodes.constant("stride", [stride])
        parts = []
        for number in range(kernel):
            last = (number - kernel + 1) * apart
            start = nodes.constant(f"start_{number}", [number * apart])
            end = nodes.constant(f"end_{number}", [last or END])
            parts.append(nodes.add("Slice", f"part_{number}", frames, start, end, axis, step))
        frames = nodes.add("Concat", "frames", *parts, axis=2)
    turned = nodes.add("Transpose", "weight_turned", weight.input[0], perm=[2, 1, 0])
    shape = nodes.constant("shape", [kernel * channels, outputs])
    rows = nodes.add("Reshape", "weight_rows", turned, shape)
    total = nodes.add(
        "MatMul",
        "product",
        nodes.add("DequantizeLinear", "values", frames, *how),
        nodes.add("DequantizeLinear", "weight", rows, *weight.input[1:], axis=1),
    )
    nodes.made[-1].name = conv.name
    if len(conv.input) > 2:
        total = nodes.add("Add", "sum", total, conv.input[2])
    nodes.made.append(
        helper.make_node("Transpose", [total], conv.output, f"{conv.name}_back", perm=TURNED)
    )
    return nodes.made
