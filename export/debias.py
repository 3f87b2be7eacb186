"""Bias correction (arXiv 1906.04721): no layer of an INT8 graph is off on average.

Rounding shifts the mean of a layer's output a little, in the same direction for every frame. Noise
averages out over the frames that the head pools, a shift does not. So, from the first layer to the
last, each bias takes up the difference of the means on calibration speech.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from export.probe import Floats, tensor_values
from export.qdq import bias_and_output
from export.twice import x86_form


def correct_biases(
    fp32: onnx.ModelProto,
    int8: onnx.ModelProto,
    windows: Sequence[Floats],
    layers: Sequence[str],
    given_back: Sequence[str] = (),
) -> None:
    """Correct the biases of an INT8 graph, in place.

    Args:
        fp32: The full-precision graph; its tensors have the same names.
        int8: The Q/DQ graph, with float biases.
        windows: Calibration speech, each of shape (T,).
        layers: Names of the quantized nodes. One without a bias is left as it is.
        given_back: As `export.twice.x86_form` takes them.
    """
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    places = {}
    for node in int8.graph.node:
        if node.name in set(layers):
            bias, tensor = bias_and_output(int8.graph, node, constants)
            if bias:
                places[tensor] = (bias, 1 if node.op_type == "Conv" else -1)
    axes = {tensor: axis for tensor, (_, axis) in places.items()}
    expected = _means(fp32, axes, windows)
    # All at once would not do: each would make up for what those before it have made up for.
    for level in tqdm(levels(int8.graph, list(places)), desc="bias correction", unit="level"):
        run = x86_form(int8, given_back)
        found = _means(run, {tensor: axes[tensor] for tensor in level}, windows)
        for tensor in level:
            bias = constants[places[tensor][0]]
            array = numpy_helper.to_array(bias) + expected[tensor] - found[tensor]
            bias.CopyFrom(numpy_helper.from_array(array.astype(np.float32), bias.name))


def levels(graph: onnx.GraphProto, tensors: Sequence[str]) -> list[list[str]]:
    """Return tensors in groups, first to last, in which none depends on another."""
    depth: dict[str, int] = {}
    for node in graph.node:
        below = max((depth.get(name, 0) for name in node.input), default=0)
        for output in node.output:
            depth[output] = below + (output in tensors)
    groups: dict[int, list[str]] = {}
    for tensor in sorted(tensors, key=depth.__getitem__):
        groups.setdefault(depth[tensor], []).append(tensor)
    return list(groups.values())


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
