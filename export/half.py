"""Half precision: graphs for a GPU, of full precision or with the INT8 layers of the signed graph.

TensorRT takes the types of a graph as they stand, so they are written into it here. Casts stand
where precisions meet, one for each value.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
from tqdm import tqdm

from export.errors import RecipeError
from export.precision import FLOAT, HALF, QDQ, fits, precisions
from export.probe import Floats, labels_equal, tensor_values

HALVES = {"model.onnx": "model_fp16.onnx", "model_int8.onnx": "model_int8_fp16.onnx"}
QDQ_OPSET = 19  # the first whose Q/DQ takes half
ENOUGH_EQUAL = 0.98  # as of INT8 to full precision


def make_halves(
    folder: Path, windows: Sequence[Floats], judged: Sequence[Floats]
) -> dict[str, float]:
    """Write the graphs for a GPU beside those that they are made of.

    One that cannot be made, or gives other labels than its source too often, is left out, which is
    said.

    Args:
        folder: Of the graphs.
        windows: As `half` takes them.
        judged: Speech to compare labels on.

    Returns:
        By file, the share of the judged windows that keep the label of the source.
    """
    found = {}
    for source, name in HALVES.items():
        file = folder / name
        try:
            onnx.save(half(folder / source, windows), file)
        except RecipeError as exc:
            tqdm.write(f"half: no {name}: {exc}")
            continue
        onnx.checker.check_model(str(file), full_check=True)  # by path: only so it finds weights
        equal = labels_equal(folder / source, file, judged)
        tqdm.write(f"half: {name} keeps the label of {equal:.1%} of the judged windows")
        if equal < ENOUGH_EQUAL:
            file.unlink()
            tqdm.write(f"half: no {name}: allowed is {ENOUGH_EQUAL:.0%} or more")
            continue
        found[name] = equal
    return found


def half(file: Path, windows: Sequence[Floats]) -> onnx.ModelProto:
    """Return a graph in half precision; its inputs and outputs stay float32.

    Args:
        file: A graph in float32, or with Q/DQ. Tensors that lie in another file and do not change
            stay there.
        windows: Speech to measure values on, each of shape (T,).

    Raises:
        RecipeError: The graph holds Q/DQ and is too old for half there, or holds operators whose
            types only running it would tell.
    """
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or any(
            part.type == AttributeProto.GRAPH for part in node.attribute
        ):
            raise RecipeError(f"{node.op_type} is no plain ONNX operator, or branches")
        if node.op_type in QDQ and opset < QDQ_OPSET:
            raise RecipeError(
                f"INT8 beside half needs opset {QDQ_OPSET}, the graph has {opset}; export the "
                "model again with a later one"
            )
    constants = {
        tensor.name: numpy_helper.to_array(tensor, str(file.parent))
        for tensor in graph.initializer
        if tensor.data_type == FLOAT
    }
    types = onnx.shape_inference.infer_shapes(model).graph
    made = {output for node in graph.node for output in node.output}
    floats = {value.name for value in (*types.value_info, *types.output) if _type(value) == FLOAT}
    floats &= made
    held = _held(onnx.load(file), floats, windows)
    held |= {name for name, value in constants.items() if fits(np.abs(value).max(initial=0))}
    floats |= {value.name for value in graph.input if _type(value) == FLOAT} - set(constants)
    chosen = precisions(graph, opset, floats, held, constants)
    _rewrite(graph, chosen, floats, constants)
    return model


def _type(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def _held(model: onnx.ModelProto, names: Collection[str], windows: Sequence[Floats]) -> set[str]:
    """Return the values, among those that are named, that half holds on every window."""
    for name in names:
        model.graph.node.append(helper.make_node("Abs", [name], [f"{name}.magnitude"]))
        largest = helper.make_node(
            "ReduceMax", [f"{name}.magnitude"], [f"{name}.largest"], keepdims=0
        )
        model.graph.node.append(largest)
    held = set(names)
    for values in tensor_values(model, [f"{name}.largest" for name in names], windows):
        held &= {name for name in names if fits(float(values[f"{name}.largest"]))}
    return held


def _rewrite(
    graph: onnx.GraphProto,
    chosen: Sequence[int],
    floats: Collection[str],
    constants: Mapping[str, Floats],
) -> None:
    """Give the nodes their precisions, with a Cast where a value is needed in the other one."""
    outputs = {value.name for value in graph.output}
    # By precision, what a value is called there.
    names = {value.name: {FLOAT: value.name} for value in graph.input}
    halves: dict[str, TensorProto] = {}
    written: list[NodeProto] = []

    def constant(name: str) -> str:
        if name not in halves:
            narrow = constants[name].astype(np.float16)
            halves[name] = numpy_helper.from_array(narrow, f"{name}.half")
        return halves[name].name

    def cast(name: str, precision: int, to: str) -> None:
        (there,) = names[name].values()
        written.append(helper.make_node("Cast", [there], [to], f"{to}.cast", to=precision))
        names[name][precision] = to

    for node, precision in zip(graph.node, chosen, strict=True):
        for place, name in enumerate(node.input):
            if name in constants and precision == HALF:
                node.input[place] = constant(name)
            elif name in floats:
                if precision not in names[name]:
                    cast(name, precision, f"{name}.{'half' if precision == HALF else 'float'}")
                node.input[place] = names[name][precision]
        written.append(node)
        for place, name in enumerate(node.output):
            if name in floats:
                names[name] = {precision: name}
                if name in outputs and precision == HALF:
                    node.output[place] = names[name][HALF] = f"{name}.half"
                    cast(name, FLOAT, name)
    del graph.value_info[:]  # of the types before
    # Copies: to empty the list empties what is in it.
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in written]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *halves.values()])
