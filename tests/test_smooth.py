import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import minimize

from export.debias import correct_biases
from export.rounding import left_of_rows, second_moments
from export.smooth import WORTH, channel_maxima, error_left, even_out, factors_of_weights

CHANNELS, OUT = 6, 4
LOUD = np.array([1, 1, 50, 1, 1, 1], np.float32)
STRENGTH = 0.75


def network(first, layer):
    """samples (N, T) -> (N, T/6, 6) frames, loud in one channel -> `first` -> `layer` -> logits."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["frames"]),
        helper.make_node("Mul", ["frames", "loud"], ["raw"]),
        *first,
        *layer,
    ]
    constants = {
        "shape": np.array([0, -1, CHANNELS]),
        "loud": LOUD,
        "scale": LOUD,
        "shift": np.linspace(-1, 1, CHANNELS).astype(np.float32),
        "weight": rng.normal(size=(CHANNELS, OUT)).astype(np.float32),
        "kernel": rng.normal(size=(OUT, CHANNELS, 3)).astype(np.float32),
        "grouped": rng.normal(size=(OUT, CHANNELS // 2, 3)).astype(np.float32),
        "bias": np.arange(OUT, dtype=np.float32),
        "more": rng.normal(size=(CHANNELS, OUT)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "A", "B"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


NORM = [helper.make_node("LayerNormalization", ["raw", "scale", "shift"], ["x"], "norm")]
GELU = [helper.make_node("Gelu", ["raw"], ["x"], "gelu")]
MATMUL = [
    helper.make_node("MatMul", ["x", "weight"], ["y"], "layer"),
    helper.make_node("Add", ["y", "bias"], ["logits"]),
]
CONV = [
    helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
    helper.make_node("Conv", ["turned", "kernel", "bias"], ["logits"], "layer", pads=[1, 1]),
]
GROUPED = [
    CONV[0],
    helper.make_node(
        "Conv", ["turned", "grouped", "bias"], ["logits"], "layer", pads=[1, 1], group=2
    ),
]
CASES = [(NORM, MATMUL), (GELU, MATMUL), (NORM, CONV), (GELU, CONV), (GELU, GROUPED)]
WINDOWS = [np.random.default_rng(i).normal(size=CHANNELS * 20).astype(np.float32) for i in range(3)]


def run(model):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.stack([session.run(["logits"], {"samples": w[None]})[0] for w in WINDOWS])


def layer_of(model):
    return next(node for node in model.graph.node if node.name == "layer")


@pytest.mark.parametrize(("first", "layer"), CASES)
def test_evening_out_changes_nothing_in_full_precision(first, layer):
    model = network(first, layer)
    expected = run(model)
    even_out(model, ["layer"], WINDOWS, STRENGTH)
    onnx.checker.check_model(model)
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "layer"), CASES)
def test_the_spread_of_the_channels_shrinks_by_the_strength(first, layer):
    model = network(first, layer)
    node = layer_of(model)
    (before,) = channel_maxima(model, [node], WINDOWS).values()
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    array = numpy_helper.to_array(weight)
    heaviest = np.abs(array).max(axis=(0, 2) if array.ndim == 3 else 1)
    if len(heaviest) < CHANNELS:  # two groups: each has half of the outputs and of the inputs
        halves = array[: OUT // 2], array[OUT // 2 :]
        heaviest = np.concatenate([np.abs(half).max(axis=(0, 2)) for half in halves])
    even_out(model, ["layer"], WINDOWS, STRENGTH)
    (after,) = channel_maxima(model, [layer_of(model)], WINDOWS).values()
    assert (before < np.median(before)).sum() == CHANNELS // 2  # they count as the median does
    loud = np.maximum(before, np.median(before))
    expected = before / loud**STRENGTH * heaviest ** (1 - STRENGTH)  # up to one common factor
    ratio = after / expected
    np.testing.assert_allclose(ratio / ratio[0], 1, rtol=1e-3)
    assert after.max() / after.min() < before.max() / before.min()


def test_the_division_costs_a_node_only_where_no_layer_norm_takes_it():
    for first, more in ((NORM, 0), (GELU, 1)):
        model = network(first, MATMUL)
        nodes = len(model.graph.node)
        even_out(model, ["layer"], WINDOWS, STRENGTH)
        assert len(model.graph.node) == nodes + more


def test_maxima_are_of_all_windows():
    model = network(GELU, MATMUL)
    (found,) = channel_maxima(model, [layer_of(model)], WINDOWS).values()
    frames = np.concatenate([w.reshape(-1, CHANNELS) for w in WINDOWS]) * LOUD
    gelu = np.maximum(frames.max(axis=0), 0.17)  # where positive values are, they are the largest
    np.testing.assert_allclose(found, gelu, rtol=0.35)


@pytest.mark.parametrize("layer", [MATMUL, CONV])
def test_a_shifted_bias_is_put_right_exactly(layer):
    fp32, off = network(GELU, layer), network(GELU, layer)
    bias = next(t for t in off.graph.initializer if t.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(OUT, 7, np.float32), "bias"))
    assert np.abs(run(off) - run(fp32)).max() > 1
    correct_biases(fp32, off, WINDOWS, ["layer"])
    np.testing.assert_allclose(run(off), run(fp32), atol=1e-4)


def test_a_layer_without_a_bias_of_its_own_is_left_alone():
    plain = [helper.make_node("MatMul", ["x", "weight"], ["logits"], "layer")]
    fp32, int8 = network(GELU, plain), network(GELU, plain)
    before = int8.SerializeToString()
    correct_biases(fp32, int8, WINDOWS, ["layer"])
    assert int8.SerializeToString() == before


def test_the_error_that_is_left_is_that_of_rounding():
    rng = np.random.default_rng(0)
    loudest, weights = np.array([1.0, 40.0, 3.0]), rng.normal(size=(3, 50))
    factor = np.array([0.2, 4.0, 0.5])
    errors = []
    for by in (np.ones(3), factor):
        values = rng.uniform(-1, 1, (20000, 3)) * loudest / by
        step = (loudest / by).max() / 127
        off = (np.round(values / step) * step - values) @ (weights * by[:, None])
        errors.append(np.square(off).sum())
    found = error_left(loudest, np.square(weights).sum(axis=1), factor)
    assert found == pytest.approx(errors[1] / errors[0], rel=0.1)
    assert found < 0.5


def test_what_gains_little_is_left_as_it_is():
    for first, scaled in ((NORM, False), (GELU, False), (GELU, True)):
        model = network(first, MATMUL)
        for tensor in model.graph.initializer:
            if tensor.name == "loud" and not scaled:  # all channels alike: nothing to even out
                tensor.CopyFrom(numpy_helper.from_array(np.ones(CHANNELS, np.float32), "loud"))
        nodes = len(model.graph.node)
        even_out(model, ["layer"], WINDOWS, STRENGTH)
        assert len(model.graph.node) == nodes + scaled


def weights_error(log, weights, left):
    """Squared steps of all columns, times what is left of all rows."""
    steps = (np.abs(weights) * np.exp(log)[:, None]).max(axis=0)
    return np.square(steps).sum() * (left * np.exp(-2 * log)).sum()


def test_with_one_column_all_weights_become_alike():
    weights, left = np.array([[1.0], [-8.0], [0.5]]), np.array([1.0, 2.0, 4.0])
    factor, share = factors_of_weights(weights, left)
    np.testing.assert_allclose(np.abs(weights[:, 0]) * factor, 4 ** (1 / 3), rtol=0.03)
    assert share == pytest.approx((1 + 2 * 64 + 4 * 0.25) / (64 * 7), rel=0.03)


def test_an_input_that_nothing_reads_gets_a_factor_that_half_precision_holds():
    weights = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    weights[2] = 0
    factor, share = factors_of_weights(weights, np.array([1.0, 2.0, 3.0, 1e-12, 1.0, 1.0]))
    assert share < 1
    assert factor.max() < 65504


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 5), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_other_factors_leave_less_of_the_error_of_weights(rows, columns, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1)))
    left = np.exp(rng.normal(size=rows))
    factor, share = factors_of_weights(weights.astype(np.float32), left)
    assert np.log(factor).mean() == pytest.approx(0, abs=1e-5)
    found = weights_error(np.log(factor.astype(float)), weights, left)
    assert share == pytest.approx(found / weights_error(np.zeros(rows), weights, left), rel=1e-4)
    options = {"maxiter": 4000, "xatol": 1e-6, "fatol": 1e-9}
    best = minimize(
        lambda log: np.log(weights_error(log, weights, left)),
        np.log(factor), method="Nelder-Mead", options=options,
    ).fun  # fmt: skip
    assert np.log(found) <= best + 0.02


@pytest.mark.parametrize(
    ("first", "loud", "taken"), [(NORM, LOUD, True), (GELU, LOUD, True), (GELU, LOUD**0, False)]
)
def test_only_the_weights_of_a_layer_that_is_given_back_count(first, loud, taken):
    model = network(first, MATMUL)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants["loud"].CopyFrom(numpy_helper.from_array(loud, "loud"))
    expected, node = run(model), layer_of(model)
    left = left_of_rows(second_moments(model, ["x"], WINDOWS, about_means=True)["x"])
    before = numpy_helper.to_array(constants["weight"])
    factor, share = factors_of_weights(before, left)
    even_out(model, ["layer"], WINDOWS, STRENGTH, ["layer"])
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-4)
    # Behind a GELU it takes a multiplication, which a small gain is not worth.
    assert taken == (first == NORM or share < WORTH)
    by = factor if taken else np.ones(CHANNELS)
    after = numpy_helper.to_array(constants["weight"])
    np.testing.assert_allclose(after, before * by[:, None], rtol=1e-4)
    assert node.input[0] == ("x_even" if taken and first == GELU else "x")


def test_a_tensor_that_another_layer_rounds_is_evened_out_for_that():
    more = helper.make_node("MatMul", ["x", "more"], ["other"], "second")
    models = [network(NORM, [*MATMUL, more]) for _ in range(2)]
    for model, given_back in zip(models, ([], ["layer"]), strict=True):
        even_out(model, ["layer", "second"], WINDOWS, STRENGTH, given_back)
    assert models[0] == models[1]
