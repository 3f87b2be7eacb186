"""Centring: each channel that a layer reads is shifted to the middle of its range.

With zero point 0, as TensorRT demands, the 255 steps lie evenly around zero. Behind a GELU, which
gives values from -0.17 up, nearly half of them would stay unused, and a channel far from zero would
waste more. Subtracting a constant from each channel before the rounding, and adding what the layer
makes of these constants to its bias, changes nothing in full precision (the channel-wise shifting
of Outlier Suppression+, arXiv 2304.09145). Behind a LayerNormalization or attention, the
subtraction goes into a bias and costs nothing; elsewhere it is a Sub, which must be worth its time.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.probe import Floats, tensor_values
from export.upstream import give, shifting

# Of the squared error of evened-out channels, the most that a subtraction may leave.
WORTH = 0.5
ONE_SIDED = 0.25  # the shorter side to the longer one


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
        _centre_tensor(model.graph, tensor, readers[tensor], *widened(low, high))


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


def widened(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Give channels behind an activation function no shorter a range than half of them have.

    A unit that calibration speech hardly excites may be loud in other speech, and would be cut off.

    Args:
        low: Smallest values of every channel, (D,).
        high: Largest values.

    Returns:
        Both; where the values are not one-sided, as they are.
    """
    below, above = float(-low.min()), float(high.max())
    if 0 <= below < ONE_SIDED * above:
        return low, np.maximum(high, np.median(high))
    if 0 <= above < ONE_SIDED * below:
        return np.minimum(low, np.median(low)), high
    return low, high


def _centre_tensor(
    graph: onnx.GraphProto,
    tensor: str,
    layers: Sequence[onnx.NodeProto],
    low: Floats,
    high: Floats,
) -> None:
    constants = {constant.name: constant for constant in graph.initializer}
    weights = [numpy_helper.to_array(constants[layer.input[1]]) for layer in layers]  # (D, O)
    alone = sum(tensor in node.input for node in graph.node) == len(layers)
    free = shifting(graph, tensor) if alone else None
    if not free and error_left(low, high, weights) > WORTH:
        return
    shift = ((low + high) / 2).astype(np.float32)
    if free:
        node, place = free
        bias = numpy_helper.to_array(constants[node.input[place]]) - shift
        give(graph, node, place, f"{tensor}_centred_bias", bias)
    else:
        centred = f"{tensor}_centred"
        inputs = [tensor, _constant(graph, f"{tensor}_shift", shift)]
        place = min(list(graph.node).index(layer) for layer in layers)
        graph.node.insert(place, helper.make_node("Sub", inputs, [centred], centred))
        for layer in layers:
            layer.input[0] = centred
    for layer, weight in zip(layers, weights, strict=True):
        _add(graph, layer, shift @ weight, constants)


def error_left(low: Floats, high: Floats, weights: Sequence[Floats]) -> float:
    """Return what centring leaves of the squared error that rounding makes.

    Channels that are evened out have a step each, as wide as their range asks for; a layer's output
    takes the error up as much as the squares of the channel's weights say.

    Args:
        low: Smallest values of every channel, (D,).
        high: Largest values.
        weights: Of the layers that read them, (D, O) each.
    """
    squares = sum(np.square(weight).sum(axis=1) for weight in weights)
    before = (np.square(np.maximum(-low, high)) * squares).sum()
    after = (np.square((high - low) / 2) * squares).sum()
    return float(after / before) if before else 1.0


def _add(
    graph: onnx.GraphProto,
    layer: onnx.NodeProto,
    more: Floats,
    constants: dict[str, onnx.TensorProto],
) -> None:
    """Add a constant (O,) to a layer's output: in its bias, or in an Add where it has none."""
    output = layer.output[0]
    readers = [node for node in graph.node if output in node.input]
    name = f"{layer.name}_bias"
    if len(readers) == 1 and readers[0].op_type == "Add":
        place = next((i for i, one in enumerate(readers[0].input) if one in constants), None)
        if place is not None:
            bias = numpy_helper.to_array(constants[readers[0].input[place]])
            give(graph, readers[0], place, name, bias + more)
            return
    layer.output[0] = f"{layer.name}_product"
    inputs = [layer.output[0], _constant(graph, name, more)]
    added = helper.make_node("Add", inputs, [output], f"{layer.name}_add")
    graph.node.insert(list(graph.node).index(layer) + 1, added)


def _constant(graph: onnx.GraphProto, name: str, values: Floats) -> str:
    graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return name
