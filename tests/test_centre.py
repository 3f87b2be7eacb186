import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erf

from export.centre import WORTH, centre, error_left, widened

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
NEGATED = [helper.make_node("Gelu", ["raw"], ["up"]), helper.make_node("Neg", ["up"], ["x"])]
NORM = [helper.make_node("LayerNormalization", ["raw", "loud", "middle"], ["x"], "norm")]
# Saturated on both sides: from -1 to 1.
CENTRED = [
    helper.make_node("Mul", ["raw", "hundred"], ["louder"]),
    helper.make_node("Tanh", ["louder"], ["x"]),
]
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
@pytest.mark.parametrize("first", [GELU, NEGATED, NORM])
def test_centring_changes_nothing_in_full_precision(first, layer):
    model = network(first, layer)
    expected = run(model)
    centre(model, ["layer"], WINDOWS)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("layers", [["layer"], ["another"], ["layer", "another"]])
@pytest.mark.parametrize("layer", [SHARED, RESIDUAL])
@pytest.mark.parametrize("first", [GELU, NORM])
def test_layers_that_share_what_they_read_and_their_constants_stay_exact(first, layer, layers):
    model = network(first, layer)
    expected = run(model)
    centre(model, layers, WINDOWS)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-2)
    if first is GELU:
        (subtraction,) = operations(model, "Sub")
        reads = {node.name for node in model.graph.node if subtraction.output[0] in node.input}
        assert reads == set(layers)


def test_every_channel_lies_around_zero_and_the_bias_makes_up_for_it():
    model = network(GELU, MATMUL)
    frames = run(model, "x").reshape(-1, CHANNELS)
    low, high = frames.min(axis=0), frames.max(axis=0)
    nodes = len(model.graph.node)
    centre(model, ["layer"], WINDOWS)
    (subtraction,) = operations(model, "Sub")
    assert len(model.graph.node) == nodes + 1
    moved = run(model, subtraction.output[0]).reshape(-1, CHANNELS)
    usual = high >= np.median(high)
    assert 3 <= usual.sum() < CHANNELS
    np.testing.assert_allclose(moved.max(axis=0)[usual], -moved.min(axis=0)[usual], rtol=1e-5)
    # The others are given as long a range as the median one.
    shift = (low + np.maximum(high, np.median(high))) / 2
    np.testing.assert_allclose(frames - moved, np.tile(shift, (len(frames), 1)), atol=1e-5)
    (name,) = set(model.graph.node[-1].input) - {"y"}
    sums = shift @ constant(model, "weight")
    np.testing.assert_allclose(constant(model, name), np.arange(OUT) + sums, rtol=1e-4)


def test_a_layer_norm_takes_the_subtraction_into_its_bias():
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


def test_what_others_read_of_a_layer_norm_stays_as_it_is():
    model = network(NORM, [*MATMUL[:1], helper.make_node("Neg", ["x"], ["other"]), MATMUL[1]])
    before = run(model, "other")
    centre(model, ["layer"], WINDOWS)
    np.testing.assert_array_equal(run(model, "other"), before)


@pytest.mark.parametrize(
    ("first", "layer", "layers"),
    [
        pytest.param(GELU, MATMUL, ["another"], id="not listed"),
        pytest.param(GELU, MATMUL, [], id="nothing listed"),
        pytest.param(GELU, CONV, ["layer"], id="convolution"),
        pytest.param(CENTRED, MATMUL, ["layer"], id="centred"),
    ],
)
def test_other_layers_are_left_as_they_are(first, layer, layers):
    model = network(first, layer)
    before = model.SerializeToString()
    centre(model, layers, WINDOWS)
    assert model.SerializeToString() == before


def floats(*values):
    return np.array(values, np.float32)


def test_ranges_counted_by_hand():
    low, high = floats(-0.17, -0.1, 0), floats(9, 3, 0)
    np.testing.assert_array_equal(widened(low, high), (low, floats(9, 3, 3)))
    np.testing.assert_array_equal(widened(-high, -low), (floats(-9, -3, -3), -low))
    both = floats(-3, -0.1, 0), floats(9, 3, 0)  # the shorter side is a third of the longer one
    np.testing.assert_array_equal(widened(*both), both)
    far = floats(5, 40), floats(6, 41)
    np.testing.assert_array_equal(widened(*far), far)


def test_the_error_that_is_left_counted_by_hand():
    # Half of 10 for 8, half of 2 for 2; the second counts 4 times: (25 + 4) / (64 + 16).
    weights = [np.array([[1.0], [0.0]]), np.array([[0.0, 0.0], [2.0, 0.0]])]
    assert error_left(floats(-2, 0), floats(8, 2), weights) == pytest.approx(29 / 80)
    assert error_left(floats(0, 0), floats(0, 0), weights) == 1


sides = arrays(np.float32, 5, elements=st.floats(-100, 100, width=32))


@given(sides, sides)
def test_ranges_only_grow_and_centring_never_adds_to_the_error(one, other):
    low, high = np.minimum(one, other), np.maximum(one, other)
    wider = widened(low, high)
    assert (wider[0] <= low).all()
    assert (wider[1] >= high).all()
    assert error_left(low, high, [np.ones((5, 2))]) <= 1 + 1e-6


def rounded(numbers, scale):
    return np.clip(np.rint(numbers / scale), -127, 127) * scale


def test_the_error_that_is_left_is_that_of_rounding():
    rng = np.random.default_rng(0)
    low, high, weights = floats(-1, 2, -7), floats(9, 6, -5), rng.normal(size=(3, 50))
    values = rng.uniform(low, high, (20000, 3))
    loud, half, shift = np.maximum(-low, high), (high - low) / 2, (low + high) / 2
    before = (rounded(values, loud / 127) - values) @ weights
    after = (rounded(values - shift, half / 127) + shift - values) @ weights
    ratio = np.square(after).mean() / np.square(before).mean()
    assert error_left(low, high, [weights]) == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("level", [1, 3, 10])
def test_centring_is_worth_it_behind_a_gelu(level):
    normal = level * np.random.default_rng(0).normal(size=(20000, 1))
    gelu = normal * (1 + erf(normal / np.sqrt(2))) / 2
    low, high = gelu.min(axis=0), gelu.max(axis=0)
    assert error_left(low, high, [np.ones((1, 1))]) < WORTH
    shift, half = (low + high) / 2, (high - low) / 2
    before = rounded(gelu, high / 127) - gelu
    after = rounded(gelu - shift, half / 127) + shift - gelu
    assert np.square(after).mean() < WORTH * np.square(before).mean()
