"""Nodes of a graph: their attributes, and others in their place."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper


class Nodes:
    """Nodes that take the place of another, and the constants that they read.

    Args:
        graph: Takes the constants.
        name: Of the other node; theirs begin with it.

    Attributes:
        made: The nodes, in their order.
    """

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        self._graph, self._name = graph, name
        self.made: list[NodeProto] = []

    def constant(self, part: str, values: object, kind: type = np.int64) -> str:
        """Add a constant; return its name."""
        name = f"{self._name}_{part}"
        self._graph.initializer.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    def add(self, operation: str, part: str, *inputs: str, **attributes: object) -> str:
        """Add a node; return the name of what it gives."""
        name = f"{self._name}_{part}"
        self.made.append(helper.make_node(operation, inputs, [name], name, **attributes))
        return name


def replace(
    graph: onnx.GraphProto, nodes: Sequence[NodeProto], others: Sequence[NodeProto]
) -> None:
    """Remove nodes and put others into the place of the first of them, in place."""
    place = list(graph.node).index(nodes[0])
    for node in nodes:
        graph.node.remove(node)
    for other in reversed(others):
        graph.node.insert(place, other)


def attribute(node: NodeProto, name: str, otherwise: Any) -> Any:
    """Return the value of an attribute of a node."""
    found = (helper.get_attribute_value(one) for one in node.attribute if one.name == name)
    return next(found, otherwise)
