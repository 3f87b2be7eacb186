"""What tells whether an INT8 kernel adds two products in 16 bits, and a bundle that does not care.

On x86 without VNNI the kernels for AVX2 do: an unsigned activation times a signed weight, twice,
is up to 2 x 255 x 127 = 64770, and 32767 is kept of it (instruction VPMADDUBSW).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_ser.bundle import X86_GRAPH, Bundle
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.testing import list_files
from export.frames import turned_weights

LENGTH = 64
EXACT, SATURATED = LENGTH * 255 * 127, LENGTH // 2 * 32767


def write_product(file: Path) -> None:
    """Write a graph that multiplies activations (4, LENGTH), uint8, by weights that are 127."""
    weights = np.full((LENGTH, 16), 127, np.int8)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["activations", "weights"], ["sums"])],
        "product",
        [value("activations", TensorProto.UINT8, [4, LENGTH])],
        [value("sums", TensorProto.INT32, [4, 16])],
        [numpy_helper.from_array(weights, "weights")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), file)


def with_seven_bits(bundle: Bundle, folder: Path) -> None:
    """Write a bundle whose graph for x86 has weights from -64 to 64: no two products saturate.

    Its self-test records what this machine makes of that graph.

    Args:
        bundle: The bundle to start from.
        folder: Takes the new one.
    """
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    model = onnx.load(bundle.graph(machine="x86_64"))
    constants = {one.name: one for one in model.graph.initializer}
    turned = turned_weights(model.graph)
    dequantized = [one.input for one in model.graph.node if one.op_type == "DequantizeLinear"]
    weights = {(turned.get(one[0], one[0]), one[1]) for one in dequantized}
    for name, its_scale in {(one, scale) for one, scale in weights if one in constants}:
        weight, scale = constants[name], constants[its_scale]
        halved = np.rint(numpy_helper.to_array(weight) / 2).astype(np.int8)
        doubled = 2 * numpy_helper.to_array(scale)
        weight.CopyFrom(numpy_helper.from_array(halved, weight.name))
        scale.CopyFrom(numpy_helper.from_array(doubled, scale.name))
    onnx.save(model, folder / X86_GRAPH)
    engine, stem = OnnxEngine(folder / X86_GRAPH, threads=1), Path(X86_GRAPH).stem
    with np.load(folder / "selftest.npz") as recorded:
        arrays = dict(recorded)
    for name in [name for name in arrays if name.startswith("samples_")]:
        logits = engine.run(arrays[name][np.newaxis])[0]
        arrays[name.replace("samples", stem)] = logits
    np.savez(folder / "selftest.npz", **arrays)
    document = json.loads((folder / "metadata.json").read_text())
    optional = {name for name, one in document["files"].items() if not one["required"]}
    document["files"] = list_files(folder, optional)
    (folder / "metadata.json").write_text(json.dumps(document, indent=1) + "\n")
