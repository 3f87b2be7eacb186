"""Zero points for values of one side, in graphs that have none.

A GELU gives values from -0.17 up. With zero point 0, as TensorRT demands, nearly half of the 255
steps would stay unused. So a whole number of steps is subtracted before the rounding, and the bias
of the layer takes up what its weights make of them, rounded as they are: steps are half as wide,
and nothing else changes. On x86 the subtraction is no node but a zero point, see
`export.qdq.unsigned`; a GPU does it along with the GELU.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from export.centre import add_to_bias
from export.nodes import attribute
from export.pairs import neighbours
from export.probe import Floats, tensor_values

ONE_SIDED = 0.25
"""The shorter side to the longer one, at most."""
MANTISSA_BITS = 16
"""Of the size of a step, so that a multiple of it is exact in float32."""


def shift_one_sided(
    exact: onnx.ModelProto,
    int8: onnx.ModelProto,
    windows: Sequence[Floats],
    layers: Collection[str],
    given_back: Collection[str] = (),
) -> None:
    """Subtract half of the range from values of one side that layers read, in place.

    Args:
        exact: The full-precision graph; nodes and tensors have the same names.
        int8: The Q/DQ graph, its ranges calibrated around zero, its weights rounded for good.
        windows: What they were calibrated with, each of shape (T,).
        layers: Names of the quantized nodes.
        given_back: Those of them that will not round what they read, and need no finer steps.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in exact.graph.node:
        if node.name in layers:
            readers.setdefault(node.input[0], []).append(node)
    tensors = [
        name
        for name, those in readers.items()
        if _allow_shift(those) and not all(node.name in given_back for node in those)
    ]
    weights = {tensor.name: tensor for tensor in exact.graph.initializer}
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    rounding = {n.input[0]: n for n in int8.graph.node if n.op_type == "QuantizeLinear"}
    scaled = {n.output[0]: n.input for n in int8.graph.node if n.op_type == "DequantizeLinear"}
    inside = {node.name: node for node in int8.graph.node}
    for name, (low, high) in _bounds(exact, tensors, windows).items():
        if not 0 <= -low <= ONE_SIDED * high or not high:
            continue
        size = constants[rounding[name].input[1]]
        high = min(high, 127 * float(numpy_helper.to_array(size)))  # where the range was clipped
        step = _coarse((high - low) / 254)
        size.CopyFrom(numpy_helper.from_array(np.array(step, np.float32), size.name))
        shift = np.array(step * round((high + low) / 2 / step), np.float32)
        pads = _pads(readers[name][0])
        _subtract(exact.graph, name, shift, pads, readers[name])
        _subtract(int8.graph, name, shift, pads, [rounding[name]])
        for node in readers[name]:
            rows = neighbours(node, numpy_helper.to_array(weights[node.input[1]]))  # (D, O)
            add_to_bias(exact.graph, node, shift * rows.sum(axis=0))
            layer = inside[node.name]
            steps, sizes = (numpy_helper.to_array(constants[n]) for n in scaled[layer.input[1]][:2])
            sums = neighbours(node, steps).sum(axis=0, dtype=np.float32) * sizes
            add_to_bias(int8.graph, layer, shift * sums)
            for part in (*node.attribute, *layer.attribute):
                if part.name == "pads":
                    part.ints[:] = [0] * len(part.ints)


def _allow_shift(layers: Sequence[NodeProto]) -> bool:
    """Return whether what layers read can be shifted: zeros beside it must be written first."""
    explicit = all(attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" for node in layers)
    return explicit and (len(layers) == 1 or not any(any(_pads(node)) for node in layers))


def _pads(node: NodeProto) -> list[int]:
    """Return how many zeros a convolution reads before and behind its values, axis by axis."""
    return list(attribute(node, "pads", []))


def _subtract(
    graph: onnx.GraphProto,
    tensor: str,
    shift: npt.NDArray[np.float32],
    pads: Sequence[int],
    readers: Sequence[NodeProto],
) -> None:
    """Let nodes read a tensor, with zeros beside it, less a number."""
    name, wide, shifted = f"{tensor}_shift", f"{tensor}_wide", f"{tensor}_shifted"
    graph.initializer.append(numpy_helper.from_array(shift, name))
    place = min(list(graph.node).index(node) for node in readers)
    graph.node.insert(
        place, helper.make_node("Sub", [wide if any(pads) else tensor, name], [shifted], shifted)
    )
    if any(pads):
        before, behind = pads[: len(pads) // 2], pads[len(pads) // 2 :]
        sides = numpy_helper.from_array(np.array([0, 0, *before, 0, 0, *behind]), f"{tensor}_sides")
        graph.initializer.append(sides)
        graph.node.insert(place, helper.make_node("Pad", [tensor, sides.name], [wide], wide))
    for node in readers:
        node.input[0] = shifted


def _bounds(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Floats]
) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of tensors."""
    found: dict[str, tuple[float, float]] = {}
    for values in tensor_values(model, names, windows):
        for name, value in values.items():
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def _coarse(step: float) -> float:
    """Return a step at least as large, of `MANTISSA_BITS`."""
    mantissa, exponent = np.frexp(step)
    return float(np.ldexp(np.ceil(mantissa * 2**MANTISSA_BITS), exponent - MANTISSA_BITS))
