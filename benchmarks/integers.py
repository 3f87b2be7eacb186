"""Integer products of other tools, computed rightly where this processor would cut off sums."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_ser.engines.onnx import OnnxEngine
from export.pairs import cuts_off_sums
from export.probe import engine_of


def exact_engine(graph: Path) -> OnnxEngine:
    """Return an engine, of one thread, whose answers are those of a processor with VNNI."""
    model = onnx.load(graph)
    if not cuts_off_sums() or all(node.op_type != "MatMulInteger" for node in model.graph.node):
        return engine_of(graph, threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / graph.name
        onnx.save(with_float_products(model), file)
        return OnnxEngine(file, threads=1)


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
