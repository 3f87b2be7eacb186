"""Constants upstream of a tensor that scale and shift its channels, so that to change them is free.

Behind a LayerNormalization they are its own. Behind attention they are those of the layer that
gives the values: attention weighs frames, its weights sum to 1, and channels stay what they are.
"""

from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from export.probe import Floats

BY_HEAD = [0, 2, 1, 3]  # (N, F, H, D) to (N, H, F, D), and back


@dataclass(frozen=True)
class Values:
    """The layer that gives the values of attention, its heads side by side.

    Attributes:
        product: Its MatMul.
        sum: The Add of its bias.
        bias: Which input of ``sum`` the bias is.
        heads: The tensor (N, H, F, D) that attention weighs.
    """

    product: NodeProto
    sum: NodeProto
    bias: int
    heads: str


def scaling(graph: GraphProto, tensor: str) -> list[tuple[NodeProto, int]]:
    """Return the inputs of nodes, as (node, place), that together scale a tensor's channels.

    The channels are the last axis of each. None are returned where none are known.
    """
    producer = next((node for node in graph.node if tensor in node.output), NodeProto())
    if producer.op_type == "LayerNormalization":
        return [(producer, place) for place in range(1, len(producer.input))]
    values = values_before(graph, tensor)
    return [(values.product, 1), (values.sum, values.bias)] if values else []


def shifting(graph: GraphProto, tensor: str) -> tuple[NodeProto, int] | None:
    """Return the input of a node that shifts a tensor's channels if shifted, None if none is known.

    The channels are its last axis.
    """
    found = scaling(graph, tensor)
    return found[-1] if len(found) > 1 else None


def values_before(graph: GraphProto, tensor: str) -> Values | None:
    """Return the layer of the values that attention makes a tensor of, None if it is none.

    The chain that is known is that of transformers and of ours: values, (N, F, H, D), by head,
    weighed by a softmax, and back to (N, F, H * D).
    """
    constants = {constant.name: constant.dims for constant in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def made_by(operation: str, name: str, alone: bool = True) -> NodeProto | None:
        node = producers.get(name)
        readers = sum(list(other.input).count(name) for other in graph.node)
        return node if node and node.op_type == operation and (readers == 1 or not alone) else None

    def by_head(name: str) -> NodeProto | None:
        node = made_by("Transpose", name)
        return node if node and list(node.attribute[0].ints) == BY_HEAD else None

    merged = made_by("Reshape", tensor, alone=False)
    back = merged and by_head(merged.input[0])
    weighed = back and made_by("MatMul", back.input[0])
    weights = weighed and made_by("Softmax", weighed.input[0])
    if not weighed or not weights or any(one.i not in (-1, 3) for one in weights.attribute):
        return None
    forth = by_head(weighed.input[1])
    split = forth and made_by("Reshape", forth.input[0])
    added = split and made_by("Add", split.input[0])
    if not added:
        return None
    bias = next((place for place, name in enumerate(added.input) if name in constants), None)
    product = None if bias is None else made_by("MatMul", added.input[1 - bias])
    if bias is None or not product or product.input[1] not in constants:
        return None
    return Values(product, added, bias, weighed.input[1])


def give(graph: GraphProto, node: NodeProto, place: int, name: str, array: Floats) -> None:
    """Give a node a constant of its own, float32, as an input: that of before may serve others."""
    graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    node.input[place] = name
