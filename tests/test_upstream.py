import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.probe import session_of
from export.upstream import scaling, shifting, values_before

HEADS, SIZE, WIDTH = 2, 3, 6


def attention(order=(0, 2, 1, 3), axis=-1, bias=True, norm=("gain", "offset")):
    """One attention over frames that a LayerNormalization gives, and the layer behind it."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("q", "v", "out")
    }
    weights |= {name: rng.normal(size=WIDTH).astype(np.float32) for name in ("gain", "offset", "b")}
    shapes = {"by_head": [1, -1, HEADS, SIZE], "flat": [1, -1, WIDTH], "frames": [1, -1, WIDTH]}

    def heads(name, source):
        return [
            helper.make_node("Reshape", [source, "by_head"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=order),
        ]

    nodes = [
        helper.make_node("Reshape", ["samples", "frames"], ["x"]),
        helper.make_node("LayerNormalization", ["x", *norm], ["normed"], axis=-1),
        helper.make_node("MatMul", ["normed", "q"], ["query"]),
        *heads("query", "query"),
        helper.make_node("Transpose", ["query_heads"], ["keys"], perm=(0, 1, 3, 2)),
        helper.make_node("MatMul", ["query_heads", "keys"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=axis),
        helper.make_node("MatMul", ["normed", "v"], ["product"], "values"),
        helper.make_node("Add", ["b", "product"], ["summed"], "values_bias"),
        *heads("value", "summed" if bias else "product"),
        helper.make_node("MatMul", ["weights", "value_heads"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["back", "flat"], ["heard"]),
        helper.make_node("MatMul", ["heard", "out"], ["logits"], "out"),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "attention",
        [tensor("samples", onnx.TensorProto.FLOAT, ["n", "t"])],
        [tensor("logits", onnx.TensorProto.FLOAT, [1, "f", WIDTH])],
        [
            *(numpy_helper.from_array(array, name) for name, array in weights.items()),
            *(numpy_helper.from_array(np.array(s, np.int64), name) for name, s in shapes.items()),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


SPEECH = np.random.default_rng(1).normal(size=(1, 5 * WIDTH)).astype(np.float32)


def value(model, name):
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    probed.graph.output.append(onnx.ValueInfoProto(name=name))
    return session_of(probed).run([name], {"samples": SPEECH})[0]


def multiplied(model, places, factor):
    constants = {constant.name: constant for constant in model.graph.initializer}
    for node, place in places:
        array = numpy_helper.to_array(constants[node.input[place]]) * factor
        constants[node.input[place]].CopyFrom(
            numpy_helper.from_array(array.astype(np.float32), node.input[place])
        )


@pytest.mark.parametrize(
    ("tensor", "constants"), [("heard", {"v", "b"}), ("normed", {"gain", "offset"})]
)
def test_constants_scale_and_shift_the_channels(tensor, constants):
    model = attention()
    before = value(model, tensor)
    factor, shift = np.random.default_rng(2).uniform(0.5, 2, size=(2, WIDTH))
    places = scaling(model.graph, tensor)
    assert {node.input[place] for node, place in places} == constants
    multiplied(model, places, factor)
    node, place = shifting(model.graph, tensor)
    assert (node, place) == places[-1]
    (offset,) = (one for one in model.graph.initializer if one.name == node.input[place])
    array = numpy_helper.to_array(offset) + shift.astype(np.float32)
    offset.CopyFrom(numpy_helper.from_array(array, offset.name))
    np.testing.assert_allclose(value(model, tensor), before * factor + shift, atol=1e-5)


def test_values_are_found_with_their_heads():
    found = values_before(attention().graph, "heard")
    assert (found.product.name, found.sum.name, found.bias) == ("values", "values_bias", 0)
    assert found.heads == "value_heads"


@pytest.mark.parametrize(
    "change", [{"axis": -2}, {"bias": False}, {"order": (0, 2, 3, 1)}], ids=lambda c: next(iter(c))
)
def test_what_is_not_known_to_be_attention_is_left_alone(change):
    model = attention(**change)  # weights that sum to 1 over queries; no bias; other channels
    assert values_before(model.graph, "heard") is None
    assert scaling(model.graph, "heard") == []
    assert shifting(model.graph, "heard") is None


@pytest.mark.parametrize("tensor", ["product", "summed", "value_split", "mixed", "back"])
def test_values_that_something_else_reads_are_left_alone(tensor):
    model = attention()
    model.graph.node.append(helper.make_node("Abs", [tensor], ["other"]))
    assert values_before(model.graph, "heard") is None


def test_a_norm_without_offset_scales_only():
    model = attention(norm=("gain",))
    assert [node.input[place] for node, place in scaling(model.graph, "normed")] == ["gain"]
    assert shifting(model.graph, "normed") is None


def test_what_no_constant_scales_has_none():
    assert scaling(attention().graph, "scores") == []
    assert scaling(attention().graph, "samples") == []
