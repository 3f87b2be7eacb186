"""Which nodes of a graph compute in half precision, and which in float32.

Layers, the products of attention among them, make half. Float32 stays what half cannot hold, and
what costs little:

- Samples, and all that is made of them before the first layer that mixes channels: raw levels, and
  log-mel, which spans more decades than half does.
- Norms and sums of many values, whose partial sums outgrow the values.
- Nodes that take or give a constant or, on speech, a value whose largest magnitude lies outside
  `RANGE`: the 1e-10 that bounds a logarithm would be 0, and a mask of -1e38 infinite.

Everything else goes with its inputs, and is half where they differ.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs

from export.probe import Floats

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")

RANGE = (2.0**-14, 65504 / 8)
"""From the smallest half with all its digits to an eighth of the largest, for louder speech."""

SCALE_ERROR = 1 / 256  # of a step of INT8, whose own rounding is as large


def fits(largest: float) -> bool:
    """Return whether half holds values of this largest magnitude."""
    return bool(largest == 0 or RANGE[0] <= largest <= RANGE[1])


def precisions(
    graph: onnx.GraphProto,
    opset: int,
    floats: Collection[str],
    held: Collection[str],
    constants: Mapping[str, Floats],
) -> list[int]:
    """Return `HALF` or `FLOAT` for every node.

    Args:
        graph: Of plain operators in the order in which they are computed.
        opset: Of the operators.
        floats: The inputs and the computed values that are float32.
        held: The values and constants that half holds, see `fits`.
        constants: The initializers that are float32.
    """
    wide = _wide(graph, opset, floats, held, constants)
    of = {value.name: FLOAT for value in graph.input}
    found = []
    for node in graph.node:
        taken = [of[name] for name in node.input if name in floats]
        half = node.op_type in (*LAYERS, *QDQ) or not taken or HALF in taken
        found.append(HALF if half and node.output[0] not in wide else FLOAT)
        of |= dict.fromkeys(node.output, found[-1])
    return found


def _wide(
    graph: onnx.GraphProto,
    opset: int,
    floats: Collection[str],
    held: Collection[str],
    constants: Mapping[str, Floats],
) -> set[str]:
    """Return the first outputs of the nodes that keep float32 whatever their inputs are."""
    known = {*floats, *constants}
    checked = known - {value.name for value in graph.input}
    wide, dequantized = set(), set()
    for node in graph.node:
        layer = node.op_type in LAYERS
        if (
            node.op_type.startswith(("Reduce", "CumSum", "GlobalAverage"))
            or node.op_type.endswith("Normalization")
            or not checked & {*node.input, *node.output} <= set(held)
            or not _takes_half(node, opset, known)
            or (layer and _hears_samples(node, constants))
            or (layer and dequantized & set(node.input))
            or (node.op_type in QDQ and not _scale_fits(constants.get(node.input[1])))
        ):
            wide.add(node.output[0])
            if node.op_type == "DequantizeLinear":
                dequantized.add(node.output[0])
    # INT8 needs one type all around: of both factors, and of what is made of them.
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in reversed(graph.node):
        if node.op_type in QDQ and any(
            reader.op_type in (*LAYERS, "DequantizeLinear") and reader.output[0] in wide
            for reader in readers.get(node.output[0], ())
        ):
            wide.add(node.output[0])
    return wide


def _hears_samples(node: NodeProto, constants: Mapping[str, Floats]) -> bool:
    """Return whether a layer is part of log-mel, or the first convolution over raw samples."""
    if any(".mel." in name for name in node.input):
        return True
    weight = constants.get(node.input[1])
    groups = next((part.i for part in node.attribute if part.name == "group"), 1)
    return node.op_type == "Conv" and weight is not None and weight.shape[1] == groups == 1


def _scale_fits(scale: Floats | None) -> bool:
    if scale is None:
        return False
    error = np.abs(scale.astype(np.float16).astype(np.float32) - scale)
    return bool((error <= SCALE_ERROR * scale).all())


def _takes_half(node: NodeProto, opset: int, known: Collection[str]) -> bool:
    """Return whether ONNX defines the operator with half in place of each float32 that it has."""
    schema = defs.get_schema(node.op_type, opset)
    kinds = {kind.type_param_str for kind in schema.type_constraints
             if "tensor(float16)" in kind.allowed_type_strs}  # fmt: skip

    def kinds_of(names: Sequence[str], formal: Sequence[defs.OpSchema.FormalParameter]) -> set[str]:
        # The last one stands for all that follow, where there may be any number.
        return {
            formal[min(place, len(formal) - 1)].type_str
            for place, name in enumerate(names)
            if name in known
        }

    taken, given = kinds_of(node.input, schema.inputs), kinds_of(node.output, schema.outputs)
    # What no input tells the type of, an attribute does: Cast, Constant.
    return taken | given <= kinds and given <= taken
