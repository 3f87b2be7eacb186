"""Clipping: a range that leaves out the rarest values, where that lowers the error of a layer.

The largest value of the calibration speech decides the step of a symmetric scale. A smaller step
rounds all others more finely, and cuts off what lies outside. Chosen is what changes the outputs of
the layers least: the squared error of every input channel, times the squared weights that it meets.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from export.probe import Floats, tensor_values
from export.smooth import exchange_channels

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Of the range, that are tried."""


def clip_ranges(
    exact: onnx.ModelProto, int8: onnx.ModelProto, windows: Sequence[Floats], layers: Sequence[str]
) -> None:
    """Narrow the ranges of what layers read, in place.

    Args:
        exact: The full-precision graph; its tensors have the same names.
        int8: The Q/DQ graph.
        windows: Calibration speech, each of shape (T,).
        layers: Names of the quantized nodes.
    """
    weights = {tensor.name: tensor for tensor in exact.graph.initializer}
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    scales = {n.input[0]: n.input[1] for n in int8.graph.node if n.op_type == "QuantizeLinear"}
    axes: dict[str, int] = {}
    importance: dict[str, Floats] = {}
    for node in exact.graph.node:
        if node.name in set(layers):
            name = node.input[0]
            axes[name] = 1 if node.op_type == "Conv" else -1
            weight = exchange_channels(node, numpy_helper.to_array(weights[node.input[1]]))
            squares = np.square(weight).reshape(len(weight), -1).sum(axis=1)
            importance[name] = importance.get(name, 0) + squares
    errors = {name: np.zeros(len(SHARES)) for name in axes}
    for values in tensor_values(exact, list(axes), windows):
        for name, value in values.items():
            frames = np.moveaxis(value, axes[name], -1).reshape(-1, value.shape[axes[name]])
            scale = float(numpy_helper.to_array(constants[scales[name]]))
            for place, share in enumerate(SHARES):
                errors[name][place] += rounding_error(frames, scale * share) @ importance[name]
    for name, error in errors.items():
        scale = numpy_helper.to_array(constants[scales[name]]) * SHARES[int(error.argmin())]
        constants[scales[name]].CopyFrom(
            numpy_helper.from_array(scale.astype(np.float32), scales[name])
        )


def rounding_error(frames: Floats, scale: float) -> npt.NDArray[np.float64]:
    """Return the sum of squared errors of every channel, (D,).

    Args:
        frames: ``(F, D)``.
        scale: Size of a step; there are steps from -128 to 127.
    """
    rounded = np.clip(np.round(frames / scale), -128, 127) * scale
    return np.square(rounded - frames, dtype=np.float64).sum(axis=0)
