"""Values in two INT8 parts: what rounding leaves of a value is rounded once more, more finely.

Both parts are multiplied by the same INT8 weights and the products added. So a layer reads values
of about 16 bits and takes twice the time of an INT8 layer, where float would take several times as
long, and the file grows by nothing. About half of what INT8 costs is the rounding of values; the
other half, that of weights, `export.smooth` and `export.rounding` keep small.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from export.first_layer import multiply_samples
from export.frames import multiply_frames, over_time
from export.qdq import bias_and_output, drop_unused, give_unrounded, unsigned, with_float_sums

REST = 254
"""The steps of the second part in one of the first: what is left is half a step or less."""
REST_NAME = "_rest"
"""How the name ends of the node that multiplies the second part."""


def x86_form(int8: onnx.ModelProto, given_back: Collection[str] = ()) -> onnx.ModelProto:
    """Return the graph that x86 runs: activations unsigned, some layers with values of two parts.

    Convolutions over time are products, see `export.frames` and `export.first_layer`, and their
    sums not rounded. Those of others are, or ONNX Runtime would have no INT8 kernel for them; given
    back, such a one multiplies float values.

    Args:
        int8: The signed Q/DQ graph.
        given_back: Names of its quantized nodes that are not to round what they read.
    """
    framed = over_time(int8.graph)
    convolutions = {node.name for node in int8.graph.node if node.op_type == "Conv"}
    products = {*given_back} - (convolutions - {node.name for node in framed})
    model = with_float_sums(int8, {*given_back} - products)
    give_unrounded(model.graph, {node.output[0] for node in framed})
    _take_two_parts(model.graph, products)
    model = unsigned(model)
    multiply_frames(model.graph)
    multiply_samples(model.graph)
    drop_unused(model.graph)
    return model


def _take_two_parts(graph: onnx.GraphProto, layers: Collection[str]) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    sources = {output: node for node in graph.node for output in node.output}
    rests: dict[str, str] = {}
    for node in [node for node in graph.node if node.name in layers]:
        rounded = sources[node.input[0]]
        tensor = bias_and_output(graph, node, constants)[1]
        if rounded.name not in rests:
            nodes, rests[rounded.name] = _rest(graph, sources[rounded.input[0]], rounded)
            _insert(graph, node, nodes)
        second = NodeProto.FromString(node.SerializeToString())
        second.name, second.output[0] = (f"{n}{REST_NAME}" for n in (node.name, node.output[0]))
        second.input[0] = rests[rounded.name]
        del second.input[2:]  # one bias is enough
        _insert(graph, node, [second])
        summed = next(one for one in graph.node if tensor in one.output)
        summed.output[0] = f"{tensor}_first"
        both = helper.make_node(
            "Add", [f"{tensor}_first", second.output[0]], [tensor], f"{tensor}_both"
        )
        graph.node.insert(list(graph.node).index(summed) + 1, both)


def _rest(
    graph: onnx.GraphProto, quantize: NodeProto, dequantize: NodeProto
) -> tuple[list[NodeProto], str]:
    """Return the nodes that round what the rounding of a tensor leaves, and what they give."""
    scale = next(one for one in graph.initializer if one.name == quantize.input[1])
    names = [f"{dequantize.output[0]}_{part}" for part in ("left", "left_q", "left_dq", "scale")]
    left, integers, rest, step = names
    finer = numpy_helper.to_array(scale) / np.float32(REST)
    graph.initializer.append(numpy_helper.from_array(np.asarray(finer, np.float32), step))
    zero = quantize.input[2]
    return [
        helper.make_node("Sub", [quantize.input[0], dequantize.output[0]], [left], left),
        helper.make_node("QuantizeLinear", [left, step, zero], [integers], integers),
        helper.make_node("DequantizeLinear", [integers, step, zero], [rest], rest),
    ], rest


def _insert(graph: onnx.GraphProto, before: NodeProto, nodes: list[NodeProto]) -> None:
    for node in nodes:
        graph.node.insert(list(graph.node).index(before), node)
