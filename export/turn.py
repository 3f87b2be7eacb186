"""Turning: the channels of each attention head are mixed, until none of them is loud.

Turned by an orthogonal matrix where the values are given, and turned back in the weights of the
layer behind attention, full precision stays as it is, at no cost. A turned channel is a sum of
many: peaks of single channels, which decide the step of all, spread over the head (QuaRot, arXiv
2404.00456, turns values so for 4 bits).
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.stats import ortho_group

from export.probe import Floats, tensor_values
from export.upstream import give, values_before


def turn(model: onnx.ModelProto, layers: Sequence[str], window: Floats) -> None:
    """Turn what layers read behind attention, in place.

    Args:
        model: Its MatMul weights are constants.
        layers: Names of the nodes that will be quantized.
        window: Speech of shape (T,), to run it on: only so is the size of a head known.
    """
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = [
        (node, values)
        for node in graph.node
        if node.op_type == "MatMul"
        and node.name in set(layers)
        and len(readers[node.input[0]]) == 1
        and (values := values_before(graph, node.input[0]))
    ]
    sizes = {
        name: value.shape[-1]
        for shapes in tensor_values(model, [values.heads for _, values in found], [window])
        for name, value in shapes.items()
    }
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    for node, values in found:
        size = sizes[values.heads]
        if size == 1:
            continue
        matrix = ortho_group.rvs(size, random_state=0)
        for part, place in ((values.product, 1), (values.sum, values.bias)):
            array = constants[part.input[place]]
            turned = (array.reshape(*array.shape[:-1], -1, size) @ matrix).reshape(array.shape)
            give(graph, part, place, f"{part.name}_turned", turned)
        weight = constants[node.input[1]]  # (H * D, O)
        back = np.einsum("ij,hio->hjo", matrix, weight.reshape(-1, size, weight.shape[1]))
        give(graph, node, 1, f"{node.name}_turned", back.reshape(weight.shape))
