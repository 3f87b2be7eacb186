"""Weights of which no two neighbours overflow 16 bits, so that INT8 is exact on every x86.

Without VNNI, ONNX Runtime multiplies two unsigned activations by two neighbouring weights at a time
and keeps 16 bits of their sum (VPMADDUBSW). Activations go up to 255, so a sum fits if the positive
weights of a pair add up to 128 or less, and the negative ones as well. ONNX Runtime's
``reduce_range`` keeps all weights within 64 for that, which takes a bit of each; to ask it of pairs
takes less, as large weights seldom meet.
"""

import platform
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edge_ser.engines import has_vnni
from export.frames import turned_weights

LARGEST_SUM = 128
"""Of the weights of one sign in a pair: 128 * 255 = 32640, and 16 bits hold 32767."""

Weights = npt.NDArray[np.float32] | npt.NDArray[np.int8]


def fit_pairs(exact: onnx.ModelProto, int8: onnx.ModelProto, layers: Collection[str]) -> None:
    """Widen the steps of channels whose pairs overflow, and round their weights again, in place.

    Args:
        exact: Full precision; its nodes and weights have the same names.
        int8: The Q/DQ graph.
        layers: Names of the quantized nodes.
    """
    originals = {tensor.name: tensor for tensor in exact.graph.initializer}
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    scaled = {n.output[0]: n for n in int8.graph.node if n.op_type == "DequantizeLinear"}
    before = {node.name: node.input[1] for node in exact.graph.node if node.name in layers}
    for node in int8.graph.node:
        if node.name not in layers:
            continue
        steps, scale, _ = scaled[node.input[1]].input
        rows = neighbours(node, numpy_helper.to_array(originals[before[node.name]]))
        size = numpy_helper.to_array(constants[scale])
        # Rounding adds up to half a step to either weight of a pair.
        sums = pair_sums(rows / size).max(axis=0) / (LARGEST_SUM - 1)
        wider = (size * np.maximum(sums if size.ndim else sums.max(), 1)).astype(np.float32)
        found = as_weight(node, np.round(rows / wider).astype(np.int8), constants[steps].dims)
        constants[steps].CopyFrom(numpy_helper.from_array(found, steps))
        constants[scale].CopyFrom(numpy_helper.from_array(wider, scale))


def cuts_off_sums() -> bool:
    """Return whether this processor keeps 16 bits of the sum of two INT8 products."""
    return platform.machine() in ("x86_64", "AMD64") and not has_vnni()


def overflows_here(model: onnx.ModelProto) -> bool:
    """Return whether this processor cuts off sums of a Q/DQ graph."""
    return cuts_off_sums() and largest_sum(model) > LARGEST_SUM


def largest_sum(model: onnx.ModelProto) -> int:
    """Return the largest of the `pair_sums` of all layers of a Q/DQ graph, 0 without any."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scaled = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    turned, largest = turned_weights(model.graph), 0
    for node in model.graph.node:
        weight = scaled.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        name = turned.get(weight.input[0], weight.input[0]) if weight else None
        if name in constants:
            steps = numpy_helper.to_array(constants[name])
            largest = max(largest, int(pair_sums(neighbours(node, steps)).max()))
    return largest


def pair_sums(rows: Weights) -> npt.NDArray[np.float32]:
    """Return the sum of the positive or of the negative weights of every pair, the larger one.

    Args:
        rows: ``(D, O)``, as `neighbours` returns them; rows 0 and 1 are a pair, 2 and 3, ...

    Returns:
        ``(ceil(D / 2), O)``, 0 or more.
    """
    padded = np.pad(rows.astype(np.float32), ((0, len(rows) % 2), (0, 0)))
    pairs = padded.reshape(-1, 2, rows.shape[1])
    return np.maximum(pairs.clip(min=0).sum(axis=1), -pairs.clip(max=0).sum(axis=1))


def neighbours(node: onnx.NodeProto, weight: Weights) -> Weights:
    """Return the weights of a layer in the order in which kernels multiply them, (D, O).

    Convolutions of ONNX Runtime, and products of frames, go over the input channels, then over the
    kernel.
    """
    if weight.ndim > 2:  # in the graph for x86 a product may read those of a convolution
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1).T
    return weight.T if _transposed(node) else weight


def as_weight(node: onnx.NodeProto, rows: Weights, dims: Sequence[int]) -> Weights:
    """Return what `neighbours` returned as the layer reads it, of these dims."""
    if node.op_type == "Conv":
        return np.moveaxis(rows.T.reshape(dims[0], *dims[2:], dims[1]), -1, 1)
    return rows.T if _transposed(node) else rows


def _transposed(node: onnx.NodeProto) -> bool:
    return any(part.name == "transB" and part.i for part in node.attribute)
