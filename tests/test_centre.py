import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erf

from export.centre import centre, offset

CHANNELS, OUT = 6, 4


def network(first, layer):
    """samples (N, T) -> (N, T/6, 6) frames -> `first` -> `layer` -> logits."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Reshape", ["samples", "shape"], ["raw"]), *first, *layer]
    constants = {
        "shape": np.array([0, -1, CHANNELS]),
        "hundred": np.array(100, np.float32),
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
# Saturated on both sides: from -1 to 1.
CENTRED = [
    helper.make_node("Mul", ["raw", "hundred"], ["loud"]),
    helper.make_node("Tanh", ["loud"], ["x"]),
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


def subtractions(model):
    return [node for node in model.graph.node if node.op_type == "Sub"]


@pytest.mark.parametrize("layer", [MATMUL, BIAS_FIRST])
@pytest.mark.parametrize("first", [GELU, NEGATED])
def test_centring_changes_nothing_in_full_precision(first, layer):
    model = network(first, layer)
    expected, read = run(model), run(model, "x")
    nodes = len(model.graph.node)
    centre(model, ["layer"], WINDOWS)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, atol=1e-5)
    (subtraction,) = subtractions(model)
    assert len(model.graph.node) == nodes + 1
    shift = offset(read.min(), read.max())  # of all windows
    assert abs(shift) > 1
    moved = run(model, subtraction.output[0])
    np.testing.assert_allclose(moved, read - shift, atol=1e-6)
    assert moved.max() == pytest.approx(-moved.min(), rel=0.02)
    (name,) = set(model.graph.node[-1].input) - {"y"}
    sums = constant(model, "weight").sum(axis=0)
    np.testing.assert_allclose(constant(model, name), np.arange(OUT) + shift * sums, rtol=1e-5)


@pytest.mark.parametrize("layers", [["layer"], ["another"], ["layer", "another"]])
def test_layers_that_share_constants_are_centred_alone(layers):
    model = network(GELU, SHARED)
    expected = run(model)
    centre(model, layers, WINDOWS)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)
    shifted = {node.output[0] for node in subtractions(model)}
    centred = {node.name for node in model.graph.node if set(node.input) & shifted}
    assert len(shifted) == len(layers)
    assert centred == set(layers)


@pytest.mark.parametrize(
    ("first", "layer", "layers"),
    [
        pytest.param(GELU, NO_ADD, ["layer"], id="no addition"),
        pytest.param(GELU, GELU_BEHIND, ["layer"], id="no bias before a GELU"),
        pytest.param(GELU, SCALED, ["layer"], id="a factor, no bias"),
        pytest.param(GELU, RESIDUAL, ["layer"], id="no constant is added"),
        pytest.param(GELU, TWO_READERS, ["layer"], id="two readers"),
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


def step(low, high, shift=0.0):
    """Return the step of symmetric int8 for values between two bounds, less a shift."""
    return max(abs(low - shift), abs(high - shift)) / 127


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        # The middle is 100 of 254 from -27: 100 steps of 1, and the bounds become -127 and 127.
        (-27, 227, 100),
        # All values on one side: half the range, whatever the smallest is.
        (0, 254, 127),
        (100, 101.6, 50.8),
        # 4.915 / 10.17 x 254 = 122.75, so 123 steps; 10 / (127 + 123) = 0.04 < 0.17 / 4 = 0.0425.
        (-0.17, 10, 123 * 0.0425),
        # 4.9 / 10.2 x 254 = 122.02, so 122 steps; 10 / (127 + 122) = 0.04016 > 0.2 / 5 = 0.04.
        (-0.2, 10, 122 * 10 / 249),
        # 1 / 8 x 254 = 31.75, so 32 steps; 5 / (127 + 32) = 0.0314 < 3 / 95 = 0.0316.
        (-3, 5, 32 * 3 / 95),
        # Off centre by less than an eighth of the range.
        (-3, 4.9, 0),
        (-1, 1, 0),
        # A tensor that is constant on calibration speech.
        (0, 0, 0),
        (3, 3, 0),
    ],
)
def test_an_offset_counted_by_hand(low, high, expected):
    assert offset(low, high) == pytest.approx(expected, rel=1e-12)
    assert offset(-high, -low) == pytest.approx(-expected, rel=1e-12)


values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@given(st.tuples(values, values).map(sorted))
@example([-0.17, 100.0])
def test_an_offset_is_a_whole_number_of_steps_and_no_step_is_larger(bounds):
    low, high = bounds
    assume(low < high)
    shift = offset(low, high)
    assert offset(-high, -low) == -shift
    assert step(low, high, shift) <= step(low, high) * (1 + 1e-9)
    if shift:
        steps = shift / step(low, high, shift)
        assert steps == pytest.approx(round(steps), rel=1e-6)
        assert abs(round(steps)) <= 127


def rounded(numbers, scale):
    return np.clip(np.rint(numbers / scale), -127, 127) * scale


@pytest.mark.parametrize("level", [1, 3, 10])
def test_rounding_behind_a_gelu_errs_less_and_meets_zero(level):
    normal = level * np.random.default_rng(0).normal(size=20000)
    gelu = normal * (1 + erf(normal / np.sqrt(2))) / 2
    low, high = gelu.min(), gelu.max()
    shift = offset(low, high)
    before = rounded(gelu, step(low, high)) - gelu
    scale = step(low, high, shift)
    after = rounded(gelu - shift, scale) + shift - gelu
    assert np.square(after).mean() < 0.6**2 * np.square(before).mean()
    assert abs(rounded(0 - shift, scale) + shift) < 1e-9 * scale
