"""The first convolution as a matrix product, where what follows wants its channels last.

A convolution over raw samples has one channel in and stays float. ONNX Runtime writes its channels
first, and turns them round for the LayerNormalization behind it: of XLS-R's convolutional encoder
and three of its layers, in INT8, 15 of 270 ms (3 s, one thread, AVX2). A product of frames of
samples writes channels last and takes 5. A frame is as long as the kernel, and the stride goes into
it without a rest, so that frames are made of rows of one stride side by side.
"""

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from export.probe import Floats

LAST = [0, 2, 1]  # (N, C, F) to (N, F, C)


def multiply_frames(graph: onnx.GraphProto) -> None:
    """Replace convolutions over one channel by products, where a Transpose follows, in place.

    Args:
        graph: Other convolutions stay: padded, dilated, or of a kernel that is no multiple of the
            stride.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        behind = [node for node in graph.node if conv.output[0] in node.input]
        if len(behind) != 1 or behind[0].op_type != "Transpose" or conv.input[1] not in constants:
            continue
        kernel = numpy_helper.to_array(constants[conv.input[1]])  # (O, 1, K)
        attributes = {part.name: helper.get_attribute_value(part) for part in conv.attribute}
        stride = attributes.get("strides", [1])[0]
        if (
            kernel.ndim != 3
            or kernel.shape[1] != 1
            or kernel.shape[2] % stride
            or list(behind[0].attribute[0].ints) != LAST
            or attributes.get("group", 1) != 1
            or attributes.get("dilations", [1]) != [1]
            or any(attributes.get("pads", [0]))
            or attributes.get("auto_pad", b"NOTSET") != b"NOTSET"
        ):
            continue
        bias = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else None
        nodes = _product(graph, conv, behind[0].output[0], kernel[:, 0], stride, bias)
        place = list(graph.node).index(conv)
        graph.node.remove(conv)
        graph.node.remove(behind[0])
        for node in reversed(nodes):
            graph.node.insert(place, node)


def _product(
    graph: onnx.GraphProto,
    conv: NodeProto,
    output: str,
    kernel: Floats,
    stride: int,
    bias: Floats | None,
) -> list[NodeProto]:
    """Return the nodes from the samples (N, 1, T) to ``output`` (N, F, O)."""

    def constant(part: str, values: object, kind: type = np.int64) -> str:
        name = f"{conv.name}_{part}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    nodes: list[NodeProto] = []

    def add(operation: str, part: str, *inputs: str, **attributes: object) -> str:
        name = f"{conv.name}_{part}"
        nodes.append(helper.make_node(operation, inputs, [name], name, **attributes))
        return name

    in_frame = kernel.shape[1] // stride
    weights = [kernel[:, stride * n : stride * (n + 1)].T for n in range(in_frame)]
    zero, one, size = constant("zero", [0]), constant("one", [1]), constant("stride", [stride])
    length = add("Shape", "length", conv.input[0], start=2)
    whole = add("Mul", "whole", add("Div", "rows_there", length, size), size)
    cut = add("Slice", "cut", conv.input[0], zero, whole, constant("time", [2]))
    rows = add("Reshape", "rows", cut, constant("row", [0, -1, stride]))  # (N, T / stride, stride)
    parts = []
    for number in range(in_frame):
        # Row by row, a frame begins; as many rows behind it are its other parts.
        last = number - in_frame + 1
        ends = constant(f"end_{number}", [last]) if last else constant("end", [np.iinfo(int).max])
        part = add(
            "Slice", f"part_{number}", rows, constant(f"start_{number}", [number]), ends, one
        )
        parts.append(part)
    if bias is not None:
        # A sample of 1 in every frame: an Add behind the product would go over all its values.
        sides = constant("sides", [0, 0, 0, 0, 0, 1])
        parts[-1] = add("Pad", "with_one", parts[-1], sides, constant("sample", 1, np.float32))
        weights.append(bias[None])
    frames = parts[0]
    if len(parts) > 1:
        frames = add("Concat", "frames", *parts, axis=2)
    matrix = constant("matrix", np.concatenate(weights), np.float32)
    nodes.append(helper.make_node("MatMul", [frames, matrix], [output], f"{conv.name}_product"))
    return nodes
