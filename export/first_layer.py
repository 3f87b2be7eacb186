"""The convolution over raw samples as a matrix product of frames, in the graph that x86 runs.

It has one channel in and stays float. A product writes its channels last, as what follows wants
them. In XLS-R that is a LayerNormalization: with the convolutional encoder and three of its layers,
15 of 270 ms were convolution and Transpose, and 5 are the product (3 s, one thread, AVX2).

In Wav2Vec2-base and HuBERT-base an InstanceNormalization over the whole window follows. Mean and
variance of the sums follow from those of the samples in a frame, ten numbers, so that it goes into
the weights and no pass over the sums is left of it.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from export.frames import END, TURNED
from export.nodes import Nodes, attribute, replace

Floats = npt.NDArray[np.float32]


def multiply_samples(graph: onnx.GraphProto) -> None:
    """Replace float convolutions over one channel by products, in place.

    Args:
        graph: Replaced are those that a Transpose or an InstanceNormalization follows, neither
            padded nor dilated, of a kernel that is a multiple of the stride.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        behind = [node for node in graph.node if conv.output[0] in node.input]
        if len(behind) != 1 or not _hears_samples(conv, constants):
            continue
        follows = behind[0]
        turned = follows.op_type == "Transpose" and attribute(follows, "perm", []) == TURNED
        normalised = follows.op_type == "InstanceNormalization"
        read = [*conv.input[1:], *(follows.input[1:] if normalised else [])]
        if not (turned or normalised) or not all(name in constants for name in read):
            continue
        weight, *others = (numpy_helper.to_array(constants[name]) for name in read)
        weight = weight[:, 0].T  # (K, O)
        nodes = Nodes(graph, conv.name)
        frames = _frames(nodes, conv.input[0], len(weight), attribute(conv, "strides", [1])[0])
        if turned:
            _multiply(nodes, frames, weight, *others)
        else:
            scale, bias = others[-2:]  # the mean takes the convolution's bias away
            _multiply_normalised(nodes, frames, weight, scale, bias, follows)
            nodes.add("Transpose", "back", nodes.made[-1].output[0], perm=TURNED)
        nodes.made[-1].output[0] = follows.output[0]
        replace(graph, [conv, follows], nodes.made)


def _hears_samples(conv: NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    dims = constants[conv.input[1]].dims if conv.input[1] in constants else []
    return (
        len(dims) == 3
        and dims[1] == 1
        and dims[2] % attribute(conv, "strides", [1])[0] == 0
        and attribute(conv, "group", 1) == 1
        and attribute(conv, "dilations", [1]) == [1]
        and not any(attribute(conv, "pads", [0]))
        and attribute(conv, "auto_pad", b"NOTSET") == b"NOTSET"
    )


def _frames(nodes: Nodes, samples: str, kernel: int, stride: int) -> str:
    """Add what makes frames (N, F, K) of samples (N, 1, T).

    To take single samples apart is slow, so frames are made of rows of one stride side by side.
    """
    size, time = nodes.constant("stride", [stride]), nodes.constant("time", [2])
    zero, one = nodes.constant("zero", [0]), nodes.constant("one", [1])
    length = nodes.add("Shape", "length", samples, start=2)
    whole = nodes.add("Mul", "whole", nodes.add("Div", "rows_there", length, size), size)
    cut = nodes.add("Slice", "cut", samples, zero, whole, time)
    row = nodes.constant("row", [0, -1, stride])
    rows = nodes.add("Reshape", "rows", cut, row)  # (N, T / stride, stride)
    parts = []
    for number in range(in_frame := kernel // stride):
        # Row by row, a frame begins; as many rows behind it are its other parts.
        start = nodes.constant(f"start_{number}", [number])
        end = nodes.constant(f"end_{number}", [number - in_frame + 1 or END])
        parts.append(nodes.add("Slice", f"part_{number}", rows, start, end, one))
    return nodes.add("Concat", "frames", *parts, axis=2)


def _multiply(nodes: Nodes, frames: str, weight: Floats, bias: Floats | None = None) -> None:
    if bias is not None:
        frames, weight = _with_one(nodes, frames), np.concatenate([weight, bias[None]])
    nodes.add("MatMul", "product", frames, nodes.constant("matrix", weight, np.float32))


def _with_one(nodes: Nodes, frames: str) -> str:
    """Add a sample of 1 to every frame: an Add behind the product would go over all its values."""
    sides = nodes.constant("sides", [0, 0, 0, 0, 0, 1])
    return nodes.add("Pad", "with_one", frames, sides, nodes.constant("sample", 1, np.float32))


def _multiply_normalised(
    nodes: Nodes, frames: str, weight: Floats, scale: Floats, bias: Floats, norm: NodeProto
) -> None:
    """Add the product of frames whose sums have, over time, given deviations and means.

    The variance of a channel is w' S w, with S the covariance of the samples in a frame. Where a
    kernel takes away what is loud in them, all but a millionth of w' S w may cancel out: it is
    computed in double precision.
    """
    time, double = nodes.constant("frame_axis", [1]), TensorProto.DOUBLE
    left = nodes.add("Sub", "centred", frames, nodes.add("ReduceMean", "mean", frames, time))
    rows = nodes.add("Cast", "centred_rows", left, to=double)
    columns = nodes.add("Transpose", "centred_columns", rows, perm=TURNED)
    count = nodes.add("Shape", "count", frames, start=1, end=2)
    count = nodes.add("Cast", "count_wide", count, to=double)
    covariance = nodes.add(
        "Div", "covariance", nodes.add("MatMul", "squares", columns, rows), count
    )  # (N, K, K)
    matrix = nodes.constant("matrix", weight, np.float64)
    terms = nodes.add("Mul", "terms", nodes.add("MatMul", "spread", covariance, matrix), matrix)
    variance = nodes.add("ReduceSum", "variance", terms, time)  # (N, 1, O)
    least = nodes.constant("epsilon", attribute(norm, "epsilon", 1e-5), np.float64)
    deviation = nodes.add("Sqrt", "deviation", nodes.add("Add", "variance_safe", variance, least))
    factor = nodes.add("Div", "factor", nodes.constant("scale", scale, np.float64), deviation)
    weights = nodes.add("Mul", "weights_wide", matrix, factor)  # (N, K, O)
    weights = nodes.add("Cast", "weights", weights, to=TensorProto.FLOAT)
    shape = nodes.add("Shape", "bias_shape", factor)
    row = nodes.add("Expand", "bias_row", nodes.constant("bias", bias, np.float32), shape)
    weights = nodes.add("Concat", "weights_and_bias", weights, row, axis=1)
    nodes.add("MatMul", "product", _with_one(nodes, left), weights)
