import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.centre import centre

CHANNELS, OUT = 6, 4
# One channel far from zero, one that is hardly excited.
LOUD = np.array([1, 2, 5, 1, 0.1, 3], np.float32)
MIDDLE = np.array([0, 0, 0, 40, 0, 0], np.float32)


def network(first, layer):
    """samples (N, T) -> (N, T/6, 6) frames -> `first` -> `layer` -> logits."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["frames"]),
        helper.make_node("Mul", ["frames", "loud"], ["raw"]),
        *first,
        *layer,
    ]
    constants = {
        "shape": np.array([0, -1, CHANNELS]),
        "hundred": np.array(100, np.float32),
        "loud": LOUD,
        "middle": MIDDLE,
        "weight": rng.normal(size=(CHANNELS, OUT)).astype(np.float32),
        "kernel": rng.normal(size=(OUT, CHANNELS, 3)).astype(np.float32),
        "bias": np.arange(OUT, dtype=np.float32),
        "column": np.arange(OUT, dtype=np.float32)[:, None],
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "A", "B"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


GELU = [helper.make_node("Gelu", ["raw"], ["x"])]
NORM = [helper.make_node("LayerNormalization", ["raw", "loud", "middle"], ["x"], "norm")]
PRODUCT = helper.make_node("MatMul", ["x", "weight"], ["y"], "layer")
MATMUL = [PRODUCT, helper.make_node("Add", ["y", "bias"], ["logits"])]
BIAS_FIRST = [PRODUCT, helper.make_node("Add", ["bias", "y"], ["logits"])]
NO_ADD = [helper.make_node("MatMul", ["x", "weight"], ["logits"], "layer")]
SCALED = [PRODUCT, helper.make_node("Mul", ["y", "bias"], ["logits"])]
GELU_BEHIND = [PRODUCT, helper.make_node("Gelu", ["y"], ["logits"])]
RESIDUAL = [
    PRODUCT,
    helper.make_node("MatMul", ["x", "weight"], ["other"], "another"),
    helper.make_node("Add", ["y", "other"], ["logits"]),
]
TWO_READERS = [
    PRODUCT,
    helper.make_node("Add", ["y", "bias"], ["z"]),
    helper.make_node("Mul", ["y", "z"], ["logits"]),
]
CONV = [
    helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
    helper.make_node("Conv", ["turned", "kernel"], ["y"], "layer", pads=[1, 1]),
    helper.make_node("Add", ["y", "column"], ["logits"]),
]
SHARED = [
    PRODUCT,
    helper.make_node("Add", ["y", "bias"], ["one"]),
    helper.make_node("MatMul", ["x", "weight"], ["product"], "another"),
    helper.make_node("Add", ["product", "bias"], ["two"]),
    helper.make_node("Mul", ["one", "two"], ["logits"]),
]
# The second is the loudest.
WINDOWS = [
    (level * np.random.default_rng(i).normal(size=CHANNELS * 20)).astype(np.float32)
    for i, level in enumerate((0.5, 2, 1))
]


def run(model, output="logits"):
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    if output != "logits":
        probed.graph.output.append(onnx.ValueInfoProto(name=output))
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.stack([session.run([output], {"samples": w[None]})[0] for w in WINDOWS])


def constant(model, name):
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def node_of(model, name):
    return next(node for node in model.graph.node if node.name == name)


def operations(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


LAYERS = [MATMUL, BIAS_FIRST, NO_ADD, GELU_BEHIND, SCALED, TWO_READERS]


@pytest.mark.parametrize("layer", LAYERS)
def test_centring_changes_nothing_in_full_precision(layer):
    model = network(NORM, layer)
    expected = run(model)
    centre(model, ["layer"], WINDOWS)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("layer", [SHARED, RESIDUAL])
def test_layers_that_share_what_they_read_and_their_constants_stay_exact(layer):
    model = network(NORM, layer)
    expected = run(model)
    centre(model, ["layer", "another"], WINDOWS)
    assert np.abs(run(model, "x").mean()) < 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-2)


def test_every_channel_lies_around_zero_and_the_biases_make_up_for_it():
    model = network(NORM, MATMUL)
    frames = run(model, "x").reshape(-1, CHANNELS)
    nodes = len(model.graph.node)
    centre(model, ["layer"], WINDOWS)
    assert len(model.graph.node) == nodes
    middle = (frames.min(axis=0) + frames.max(axis=0)) / 2
    assert middle[3] > 35
    found = constant(model, node_of(model, "norm").input[2])
    np.testing.assert_allclose(found, MIDDLE - middle, atol=1e-4)
    moved = run(model, "x").reshape(-1, CHANNELS)
    np.testing.assert_allclose(moved.max(axis=0), -moved.min(axis=0), atol=1e-4)
    (name,) = set(model.graph.node[-1].input) - {"y"}
    sums = middle @ constant(model, "weight")
    np.testing.assert_allclose(constant(model, name), np.arange(OUT) + sums, rtol=1e-4)


def test_what_others_read_of_a_layer_norm_stays_as_it_is():
    model = network(NORM, [*MATMUL[:1], helper.make_node("Neg", ["x"], ["other"]), MATMUL[1]])
    before = run(model, "other")
    centre(model, ["layer"], WINDOWS)
    np.testing.assert_array_equal(run(model, "other"), before)


@pytest.mark.parametrize(
    ("first", "layer", "layers"),
    [
        pytest.param(NORM, MATMUL, ["another"], id="not listed"),
        pytest.param(NORM, MATMUL, [], id="nothing listed"),
        pytest.param(NORM, SHARED, ["layer"], id="one of two"),
        pytest.param(NORM, CONV, ["layer"], id="convolution"),
        pytest.param(GELU, MATMUL, ["layer"], id="not free"),
    ],
)
def test_other_layers_are_left_as_they_are(first, layer, layers):
    model = network(first, layer)
    before = model.SerializeToString()
    centre(model, layers, WINDOWS)
    assert model.SerializeToString() == before
