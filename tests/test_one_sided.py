import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.one_sided import shift_one_sided
from export.qdq import unsigned
from export.quantize import calibrate

CHANNELS, OUT = 6, 4
LOUD = np.array([1, 2, 5, 1, 0.1, 3], np.float32)
RNG = np.random.default_rng(0)
CONSTANTS = {
    "shape": np.array([0, -1, CHANNELS]),
    "loud": LOUD,
    "weight": RNG.normal(size=(CHANNELS, OUT)).astype(np.float32),
    "rows": RNG.normal(size=(OUT, CHANNELS)).astype(np.float32),
    "kernel": RNG.normal(size=(OUT, CHANNELS, 3)).astype(np.float32),
    "groups": RNG.normal(size=(OUT, CHANNELS // 2, 3)).astype(np.float32),
    "bias": np.arange(OUT, dtype=np.float32),
    "first": np.array(0),
}


def node(operation, inputs, output, name="", **attributes):
    return helper.make_node(operation, inputs.split(), [output], name, **attributes)


GELU = [node("Gelu", "raw", "x")]
LOUDER = [node("Gelu", "raw", "up"), node("Mul", "up up", "x")]
NEGATED = [node("Gelu", "raw", "up"), node("Neg", "up", "x")]
BOTH = [node("Identity", "raw", "x")]
TURNED = node("Transpose", "x", "turned", perm=[0, 2, 1])
LAYERS = {
    "product": [node("MatMul", "x weight", "y", "layer"), node("Add", "y bias", "logits")],
    "product without a bias": [node("MatMul", "x weight", "logits", "layer")],
    "convolution": [TURNED, node("Conv", "turned kernel bias", "logits", "layer")],
    "groups": [TURNED, node("Conv", "turned groups", "logits", "layer", group=2, pads=[0, 0])],
    "gemm": [
        node("Gather", "x first", "one", axis=1),
        node("Gemm", "one rows bias", "logits", "layer", transB=1),
    ],
    "gemm without a bias": [
        node("Gather", "x first", "one", axis=1),
        node("Gemm", "one weight", "logits", "layer"),
    ],
    "read by others": [
        node("MatMul", "x weight", "y", "layer"),
        node("MatMul", "x weight", "z", "another"),
        node("Sub", "x loud", "w"),
        node("MatMul", "w weight", "v"),
        node("Sum", "y z v", "logits"),
    ],
    "zeros beside it": [TURNED, node("Conv", "turned kernel bias", "logits", "layer", pads=[2, 1])],
    "zeros for one of two": [
        TURNED,
        node("Conv", "turned kernel bias", "y", "layer", pads=[2, 0]),
        node("Conv", "turned kernel bias", "z", "another"),
        node("Concat", "y z", "logits", axis=2),
    ],
    "zeros unsaid": [
        TURNED,
        node("Conv", "turned kernel bias", "logits", "layer", auto_pad="SAME_UPPER"),
    ],
}
WINDOWS = [
    (level * np.random.default_rng(i).normal(size=CHANNELS * 20)).astype(np.float32)
    for i, level in enumerate((0.5, 2, 1))
]


def network(first, layer):
    """samples (N, T) -> (N, T/6, 6) frames -> `first` -> `layer` -> logits."""
    rank = 2 if layer[-1].op_type == "Gemm" else 3
    nodes = [
        node("Reshape", "samples shape", "frames"),
        node("Mul", "frames loud", "raw"),
        *first,
        *layer,
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*"NAB"][:rank])],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def shifted(first, layer, given_back=()):
    exact = network(first, LAYERS[layer])
    int8 = calibrate(exact, WINDOWS, [])
    before = exact.SerializeToString(), int8.SerializeToString()
    layers = {n.name for n in exact.graph.node if n.name}
    shift_one_sided(exact, int8, WINDOWS, layers, given_back)
    return exact, int8, before


def answers(model, windows):
    """Return the logits of all windows, side by side, as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.stack([session.run(["logits"], {"samples": one[None]})[0] for one in windows])


def constant(model, name):
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def rounding(model):
    """The node that rounds what the layer reads."""
    (found,) = (n for n in model.graph.node if n.output[0].endswith("shifted"))
    (quantize,) = (n for n in model.graph.node if found.output[0] in n.input)
    return found, quantize


SHIFTED = [name for name in LAYERS if name not in ("zeros for one of two", "zeros unsaid")]


@pytest.mark.parametrize("layer", SHIFTED)
def test_full_precision_is_as_it_was_and_int8_is_closer_to_it(layer):
    expected = answers(network(GELU, LAYERS[layer]), WINDOWS)
    exact, int8, (_, before) = shifted(GELU, layer)
    onnx.checker.check_model(exact, full_check=True)
    onnx.checker.check_model(int8, full_check=True)
    np.testing.assert_allclose(answers(exact, WINDOWS), expected, atol=1e-4)
    old = np.square(answers(onnx.ModelProto.FromString(before), WINDOWS) - expected).mean()
    new = np.square(answers(int8, WINDOWS) - expected).mean()
    # A few frames, and what rounding of weights does to them, decide what is read by a Gemm.
    assert new < (0.8 if "gemm" not in layer else 1.5) * old


@pytest.mark.parametrize("layer", SHIFTED)
def test_steps_are_half_as_wide_and_reach_as_far(layer):
    _, int8, (_, before) = shifted(GELU, layer)
    subtract, quantize = rounding(int8)
    step, shift = (constant(int8, n.input[1]) for n in (quantize, subtract))
    assert step.dtype == shift.dtype == np.float32
    assert shift == step * np.round(shift / step)
    old = onnx.ModelProto.FromString(before)
    high = 127 * constant(old, quantize.input[1])
    assert high / 254 <= step <= (high + 0.17) / 254 * 1.001
    assert shift + 127.5 * step >= high
    assert shift - 127.5 * step <= 0 or "gemm" in layer


def test_the_smallest_numbers_are_known():
    """What is 0 to 254 has steps of 1 from 127 down and up."""
    ramp = [np.arange(0, 255, 1, np.float32)[: 42 * CHANNELS] / np.tile(LOUD, 42)]
    ramp[0][-1] = 254 / LOUD[-1]
    exact = network([node("Relu", "raw", "x")], LAYERS["product"])
    int8 = calibrate(exact, ramp, [])
    steps = constant(int8, "weight_quantized").astype(np.float32)
    rounded = steps * constant(int8, "weight_scale")
    shift_one_sided(exact, int8, ramp, {"layer"})
    subtract, quantize = rounding(int8)
    assert constant(int8, subtract.input[1]) == 127
    assert constant(int8, quantize.input[1]) == 1
    # Each bias takes up what the weights of its graph make of 127.
    ones = np.full(CHANNELS, 127.0)
    for model, weight in ((exact, CONSTANTS["weight"]), (int8, rounded)):
        np.testing.assert_allclose(
            constant(model, "layer_bias"), CONSTANTS["bias"] + ones @ weight, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("first", "layer", "given_back"),
    [
        pytest.param(BOTH, "product", (), id="two sides"),
        pytest.param(NEGATED, "product", (), id="the other side"),
        pytest.param(GELU, "zeros for one of two", (), id="zeros for one of two"),
        pytest.param(GELU, "zeros unsaid", (), id="zeros unsaid"),
        pytest.param(GELU, "product", ("layer",), id="not rounded"),
    ],
)
def test_others_are_left_as_they_are(first, layer, given_back):
    exact, int8, before = shifted(first, layer, given_back)
    assert (exact.SerializeToString(), int8.SerializeToString()) == before


def test_a_tensor_of_which_one_reader_is_rounded_is_shifted():
    _, int8, _ = shifted(GELU, "read by others", ("another",))
    rounding(int8)


def test_a_clipped_range_stays_clipped():
    exact = network(LOUDER, LAYERS["product"])
    int8 = calibrate(exact, WINDOWS, [])
    (size,) = (t for t in int8.graph.initializer if t.name == "x_scale")
    high = 127 * numpy_helper.to_array(size) / 2
    size.CopyFrom(numpy_helper.from_array(np.array(high / 127, np.float32), "x_scale"))
    shift_one_sided(exact, int8, WINDOWS, {"layer"})
    assert constant(int8, "x_scale") == pytest.approx(high / 254, rel=1e-4)


@pytest.mark.parametrize("layer", SHIFTED)
def test_a_zero_point_does_what_the_subtraction_does(layer):
    _, int8, _ = shifted(GELU, layer)
    model = unsigned(int8)
    assert not [n for n in model.graph.node if n.output[0].endswith("shifted")]
    subtract, quantize = rounding(int8)
    (found,) = (n for n in model.graph.node if n.name == quantize.name)
    steps = constant(int8, subtract.input[1]) / constant(int8, quantize.input[1])
    assert constant(model, found.input[2]) == 128 - steps
    assert constant(model, found.input[2]).dtype == np.uint8
    # One value in many lies so near to the middle of a step that it is rounded the other way.
    apart = np.abs(answers(model, WINDOWS) - answers(int8, WINDOWS))
    assert np.median(apart) < 1e-6
    assert np.mean(apart > 1e-4) < 0.01


def test_subtractions_of_other_numbers_stay():
    _, int8, _ = shifted(GELU, "product")
    subtract, _ = rounding(int8)
    (shift,) = (t for t in int8.graph.initializer if t.name == subtract.input[1])
    shift = numpy_helper.to_array(shift)
    step = constant(int8, rounding(int8)[1].input[1])
    for value in (1.234567, np.full(CHANNELS, shift), -128 * step, 129 * step):
        changed = onnx.ModelProto.FromString(int8.SerializeToString())
        (other,) = (t for t in changed.graph.initializer if t.name == subtract.input[1])
        other.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), other.name))
        model = unsigned(changed)
        assert [n for n in model.graph.node if n.output[0] == subtract.output[0]]
        np.testing.assert_array_equal(answers(model, WINDOWS), answers(changed, WINDOWS))
