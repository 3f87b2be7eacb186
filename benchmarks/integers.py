"""Integer products as float ones, where this processor would cut off their sums."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_ser.engines.onnx import OnnxEngine
from export.pairs import cuts_off_sums
from export.probe import engine_of
from export.qdq import drop_unused
from export.twice import REST_NAME


def exact_engine(graph: Path) -> OnnxEngine:
    """Return an engine, of one thread, whose answers are those of a processor with VNNI."""
    if not cuts_off_sums():
        return engine_of(graph, threads=1)
    model = with_parts_summed(with_float_products(onnx.load(graph)))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / graph.name
        onnx.save(model, file)
        return engine_of(file, threads=1)


def with_float_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose MatMulInteger nodes multiply the same integers as float numbers.

    A float number holds whole numbers up to 2^24; a sum of 2048 products of 8 bits can be larger
    and is then off by a ten-millionth.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            nodes.append(node)
            continue
        values, weights, zero, weights_zero = node.input
        name = node.output[0]
        whole, middle, centred, wide = (f"{name}_{part}" for part in ("a", "zero", "left", "b"))
        integers = constants[weights].astype(np.float32)
        integers -= constants[weights_zero].astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(integers, wide))
        nodes += [
            helper.make_node("Cast", [values], [whole], whole, to=TensorProto.FLOAT),
            helper.make_node("Cast", [zero], [middle], middle, to=TensorProto.FLOAT),
            helper.make_node("Sub", [whole, middle], [centred], centred),
            helper.make_node("MatMul", [centred, wide], [name], node.name),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def with_parts_summed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph of `export.twice` that adds values of two parts, then multiplies.

    As float numbers that is the same with half of the products.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    products = {node.name: node for node in graph.node if node.op_type in ("Gemm", "MatMul")}
    for first in list(products.values()):
        second = products.get(first.name + REST_NAME)
        if second is None:
            continue
        both = second
        while both.op_type != "Add":  # behind a convolution's product is a Transpose
            both = next(node for node in graph.node if both.output[0] in node.input)
        makers[both.input[0]].output[0] = both.output[0]
        whole = f"{first.name}_whole"
        summed = helper.make_node("Add", [first.input[0], second.input[0]], [whole], whole)
        graph.node.insert(list(graph.node).index(first), summed)
        first.input[0] = whole
        graph.node.remove(both)
    drop_unused(graph)
    return model
