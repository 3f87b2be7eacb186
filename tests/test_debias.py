import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.debias import correct_biases, levels
from export.probe import computing, tensor_values

WINDOWS = [np.random.default_rng(n).normal(size=30 + n).astype(np.float32) for n in range(3)]


def graph(nodes, constants):
    """Samples (N, T) to logits; every node by its operation, inputs and output."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, inputs, [out], out) for kind, inputs, out in nodes],
            "g",
            [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.float32(v), k) for k, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )


def two_layers(shift):
    """Two layers, one behind the other, and a third beside them; their weights are off by a bit."""
    nodes = [
        ("Unsqueeze", ["samples", "two"], "x"),
        ("MatMul", ["x", "w1"], "m1"), ("Add", ["m1", "b1"], "y1"), ("Relu", ["y1"], "r1"),
        ("MatMul", ["r1", "w2"], "m2"), ("Add", ["m2", "b2"], "y2"),
        ("MatMul", ["x", "w3"], "m3"), ("Add", ["m3", "b3"], "y3"),
        ("Add", ["y2", "y3"], "logits"),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"w1": (1, 4), "b1": (4,), "w2": (4, 3), "b2": (3,), "w3": (1, 3), "b3": (3,)}
    constants = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for name in ("w1", "w2", "w3", "b1"):
        constants[name] = constants[name] + shift
    model = graph(nodes, {n: v for n, v in constants.items()})
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two"))
    return model


def means(model, tensor):
    values = [v[tensor] for v in tensor_values(model, [tensor], WINDOWS)]
    return np.concatenate([v.reshape(-1, v.shape[-1]) for v in values]).mean(axis=0)


def test_every_layer_has_the_mean_of_full_precision_behind_it():
    fp32, int8 = two_layers(0.0), two_layers(0.3)
    before = [np.abs(means(fp32, name) - means(int8, name)).max() for name in ("y1", "y2")]
    assert min(before) > 0.2
    correct_biases(fp32, int8, WINDOWS, ["m1", "m2", "m3"])
    for name in ("y1", "y2", "y3"):
        np.testing.assert_allclose(means(fp32, name), means(int8, name), atol=1e-5)


def test_layers_that_do_not_depend_on_each_other_take_their_turn_together():
    model = two_layers(0.0).graph
    assert levels(model, ["y1", "y2", "y3"]) == [["y1", "y3"], ["y2"]]
    assert levels(model, ["logits", "y2"]) == [["y2"], ["logits"]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["y1"], ["x", "m1", "y1"]), (["y3", "x"], ["x", "m3", "y3"]), (["samples"], [])],
)
def test_only_what_a_tensor_depends_on_is_computed(names, expected):
    model = two_layers(0.0)
    assert [node.name for node in computing(model.graph, names)] == expected
    if expected:
        before = model.SerializeToString()
        assert [list(values) for values in tensor_values(model, names, WINDOWS)] == [names] * 3
        assert model.SerializeToString() == before
