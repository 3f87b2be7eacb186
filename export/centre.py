"""Centring: what a layer reads is shifted so that a symmetric 8-bit scale is used on both sides.

A GELU gives values from -0.17 up to several units; with zero point 0, as TensorRT demands, nearly
half of the 255 steps would stay unused. Subtracting a constant before the rounding and adding what
the layer makes of that constant to its bias changes nothing in full precision. The constant is a
whole number of steps, so that zero, the most frequent value behind a GELU, is still met exactly.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.probe import Floats, tensor_values

STEPS = 254  # from -127 to 127
LOPSIDED = 0.25  # below this share of the range, a shift is not worth its subtraction


def centre(model: onnx.ModelProto, layers: Sequence[str], windows: Sequence[Floats]) -> None:
    """Centre what MatMul layers with a bias read, in place.

    Args:
        model: Its MatMul weights are constants.
        layers: Names of the nodes that will be quantized.
        windows: Calibration speech, each of shape (T,).
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for layer in graph.node:
        readers = [node for node in graph.node if set(layer.output) & set(node.input)]
        if layer.op_type == "MatMul" and layer.name in set(layers) and len(readers) == 1:
            place = next((i for i, name in enumerate(readers[0].input) if name in constants), None)
            if readers[0].op_type == "Add" and place is not None:
                found[layer.name] = layer, readers[0], place
    ranges = _ranges(model, sorted({layer.input[0] for layer, _, _ in found.values()}), windows)
    for layer, add, place in found.values():
        low, high = ranges[layer.input[0]]
        shift = offset(low, high)
        if not shift:
            continue
        weight = numpy_helper.to_array(constants[layer.input[1]])
        bias = numpy_helper.to_array(constants[add.input[place]]) + shift * weight.sum(axis=0)
        names = f"{layer.name}_shift", f"{layer.name}_bias", f"{layer.name}_centred"
        for name, value in zip(names, (np.float32(shift), bias), strict=False):
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        subtract = helper.make_node("Sub", [layer.input[0], names[0]], [names[2]], names[2])
        graph.node.insert(list(graph.node).index(layer), subtract)
        layer.input[0], add.input[place] = names[2], names[1]


def offset(low: float, high: float) -> float:
    """Return what to subtract from values between two bounds: a whole number of 8-bit steps.

    Args:
        low: Smallest value.
        high: Largest value.

    Returns:
        0 where the range is centred well enough, or is a single value.
    """
    if low == high or abs(low + high) < LOPSIDED * (high - low):
        return 0.0
    if low + high < 0:
        return -offset(-high, -low)
    side = STEPS // 2
    most = side if low >= 0 else side - 1  # a negative value needs a step of its own
    steps = min(round((low + high) / (high - low) * side), most)
    # The larger of the two sides decides the step, as it does in the quantizer.
    return steps * max(high / (side + steps), -low / max(1, side - steps))


def _ranges(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Floats]
) -> dict[str, tuple[float, float]]:
    bounds: dict[str, tuple[float, float]] = {}
    for values in tensor_values(model, names, windows):
        for name, value in values.items():
            low, high = bounds.get(name, (np.inf, -np.inf))
            bounds[name] = min(low, float(value.min())), max(high, float(value.max()))
    return bounds
