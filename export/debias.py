"""Bias correction (arXiv 1906.04721): no layer of an INT8 graph is off on average.

Rounding shifts the mean of a layer's output a little, in the same direction for every frame. Noise
averages out over the frames that the head pools, a shift does not. So, from the first layer to the
last, each bias takes up the difference of the means on calibration speech.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from export.probe import Floats, tensor_values


def correct_biases(
    fp32: onnx.ModelProto, int8: onnx.ModelProto, windows: Sequence[Floats], layers: Sequence[str]
) -> None:
    """Correct the biases of an INT8 graph, in place.

    Args:
        fp32: The full-precision graph; its tensors have the same names.
        int8: The Q/DQ graph, with float biases.
        windows: Calibration speech, each of shape (T,).
        layers: Names of the quantized nodes. One without a bias is left as it is.
    """
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    places = {}
    for node in int8.graph.node:
        if node.name in set(layers):
            bias, tensor = bias_and_output(int8.graph, node, constants)
            if bias:
                places[tensor] = (bias, 1 if node.op_type == "Conv" else -1)
    if not places:
        return
    expected = _means(fp32, {tensor: axis for tensor, (_, axis) in places.items()}, windows)
    for tensor, (bias, axis) in places.items():
        found = _means(int8, {tensor: axis}, windows)
        array = numpy_helper.to_array(constants[bias]) + expected[tensor] - found[tensor]
        constants[bias].CopyFrom(numpy_helper.from_array(array.astype(np.float32), bias))


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


def _means(
    model: onnx.ModelProto, axes: dict[str, int], windows: Sequence[Floats]
) -> dict[str, Floats]:
    """Return the mean of every channel of tensors over all frames of all windows."""
    sums = {name: np.zeros(1, np.float32) for name in axes}
    frames = dict.fromkeys(axes, 0)
    for values in tensor_values(model, list(axes), windows):
        for name, value in values.items():
            channels = np.moveaxis(value, axes[name], -1).reshape(-1, value.shape[axes[name]])
            sums[name] = sums[name] + channels.sum(axis=0)
            frames[name] += len(channels)
    return {name: sums[name] / frames[name] for name in axes}
