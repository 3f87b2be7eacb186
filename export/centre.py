"""Centring: each channel that a layer reads is shifted to the middle of its range.

With zero point 0, as TensorRT demands, the 255 steps lie evenly around zero, and a channel far from
zero would waste most of them. Subtracting a constant from each channel before the rounding, and
adding what the layer makes of these constants to its bias, changes nothing in full precision (the
channel-wise shifting of Outlier Suppression+, arXiv 2304.09145). Behind a LayerNormalization or
attention, the subtraction goes into a bias and costs nothing; elsewhere it would be a node, and
`export.one_sided` does what is free there.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.probe import Floats, tensor_values
from export.upstream import give, shifting


def centre(model: onnx.ModelProto, layers: Sequence[str], windows: Sequence[Floats]) -> None:
    """Centre what MatMul layers read, in place.

    Args:
        model: Its MatMul weights are constants.
        layers: Names of the nodes that will be quantized.
        windows: Calibration speech, each of shape (T,).
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name in set(layers):
            readers.setdefault(node.input[0], []).append(node)
    for tensor, (low, high) in channel_bounds(model, list(readers), windows).items():
        _centre_tensor(model.graph, tensor, readers[tensor], (low + high) / 2)


def channel_bounds(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Floats]
) -> dict[str, tuple[Floats, Floats]]:
    """Return the smallest and largest values of every channel, the last axis, by tensor."""
    bounds: dict[str, tuple[Floats, Floats]] = {}
    for values in tensor_values(model, names, windows):
        for name, value in values.items():
            frames = value.reshape(-1, value.shape[-1])
            low, high = bounds.get(name, (frames[0], frames[0]))
            bounds[name] = (
                np.minimum(low, frames.min(axis=0)), np.maximum(high, frames.max(axis=0))
            )  # fmt: skip
    return bounds


def _centre_tensor(
    graph: onnx.GraphProto, tensor: str, layers: Sequence[onnx.NodeProto], shift: Floats
) -> None:
    found = shifting(graph, tensor)
    if not found or sum(tensor in node.input for node in graph.node) != len(layers):
        return
    constants = {constant.name: constant for constant in graph.initializer}
    node, place = found
    bias = numpy_helper.to_array(constants[node.input[place]]) - shift
    give(graph, node, place, f"{tensor}_centred_bias", bias)
    for layer in layers:
        weight = numpy_helper.to_array(constants[layer.input[1]])  # (D, O)
        add_to_bias(graph, layer, shift @ weight)


def add_to_bias(graph: onnx.GraphProto, layer: onnx.NodeProto, more: Floats) -> None:
    """Add a constant to a layer's output: in its bias, or in one of its own where it has none.

    Args:
        graph: Is changed.
        layer: A Conv, Gemm or MatMul of it, whose bias, if it is a constant, may serve others too.
        more: ``(O,)``.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    name = f"{layer.name}_bias"
    if layer.op_type != "MatMul":
        if len(layer.input) > 2:
            more = numpy_helper.to_array(constants[layer.input[2]]) + more
        else:
            layer.input.append("")
        give(graph, layer, 2, name, more)
        return
    output = layer.output[0]
    readers = [node for node in graph.node if output in node.input]
    if len(readers) == 1 and readers[0].op_type == "Add":
        place = next((i for i, one in enumerate(readers[0].input) if one in constants), None)
        if place is not None:
            bias = numpy_helper.to_array(constants[readers[0].input[place]])
            give(graph, readers[0], place, name, bias + more)
            return
    layer.output[0] = f"{layer.name}_product"
    added = helper.make_node("Add", [layer.output[0], ""], [output], f"{layer.name}_add")
    give(graph, added, 1, name, more)
    graph.node.insert(list(graph.node).index(layer) + 1, added)
