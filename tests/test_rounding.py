import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from export import rounding
from export.quantize import WindowReader
from export.rounding import (
    held_at_once,
    left_of_rows,
    ordered,
    round_rows,
    round_weights,
    second_moments,
    upper_factor,
)


def output_error(weights, scale, steps, moments):
    """Sum of squares of what rounding changes at the output, over all inputs."""
    change = weights - steps * scale
    return np.trace(change.T @ moments @ change)


def correlated(dim, frames, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(frames, 3)) @ rng.normal(size=(3, dim))
    return inputs + 0.1 * rng.normal(size=(frames, dim))


def test_the_second_weight_makes_up_for_the_first():
    # Two inputs that are always equal: only the sum of their weights matters. To the nearest step
    # 0.4 + 0.4 becomes 0 + 0; the sum 0.8 is nearer to 1.
    steps = round_rows(np.full((2, 1), 0.4, np.float32), np.ones(1), *ordered(np.ones((2, 2))))
    assert sorted(steps.ravel()) == [0, 1]


def test_without_correlation_the_nearest_step_is_taken():
    weights = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32)
    scale = np.abs(weights).max(axis=0) / 127
    steps = round_rows(weights, scale, *ordered(np.diag(np.linspace(1, 5, 200))))
    np.testing.assert_array_equal(steps, np.round(weights / scale))


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_close_to_the_best_of_all_roundings(seed):
    rng = np.random.default_rng(seed)
    weights, moments = rng.uniform(-3, 3, (6, 1)), np.cov(correlated(6, 300, seed).T)
    errors = [
        output_error(weights, 1.0, (np.floor(weights.T) + up).T, moments)
        for up in itertools.product((0, 1), repeat=6)
    ]
    found = output_error(weights, 1.0, round_rows(weights, np.ones(1), *ordered(moments)), moments)
    nearest = output_error(weights, 1.0, np.round(weights), moments)
    assert found < nearest / 2 or found <= 1.5 * min(errors)


def test_what_is_left_of_a_row_is_what_reaches_the_output(monkeypatch):
    monkeypatch.setattr(rounding, "DAMPING", 1e-9)
    rng = np.random.default_rng(0)
    moments = np.cov(correlated(30, 300, 0).T)
    weights = rng.uniform(-100, 100, (30, 4000))  # steps of 1
    steps = round_rows(weights, np.ones(4000), *ordered(moments))
    expected = output_error(weights, 1.0, steps, moments) / 4000
    # The error of a step is even between -1/2 and 1/2: its square is 1/12.
    assert left_of_rows(moments).sum() / 12 == pytest.approx(expected, rel=0.05)
    assert left_of_rows(moments).sum() < 0.5 * np.trace(moments)


def test_without_correlation_all_of_a_row_is_left():
    squares = np.array([3.0, 1.0, 2.0, 5.0])
    found = left_of_rows(np.diag(squares))
    np.testing.assert_allclose(found, squares + rounding.DAMPING * squares.mean())


@settings(max_examples=30, deadline=None)
@given(
    dim=st.integers(1, 300), out=st.integers(1, 4), silent=st.booleans(), seed=st.integers(0, 99)
)
def test_steps_stay_in_range_and_many_inputs_make_up_for_each_other(dim, out, silent, seed):
    rng = np.random.default_rng(seed)
    inputs = correlated(dim, 400, seed)
    if silent:
        inputs[:, 0] = 0  # an input that is always 0 has no say
    weights = rng.normal(size=(dim, out)).astype(np.float32)
    scale, moments = np.abs(weights).max(axis=0) / 127, inputs.T @ inputs
    steps = round_rows(weights, scale, *ordered(moments))
    assert steps.dtype == np.int8
    assert np.abs(steps.astype(int)).max() <= 127
    if dim >= 50:  # it is greedy: a few weights may be better off at their nearest steps
        nearest = output_error(weights, scale, np.round(weights / scale), moments)
        assert output_error(weights, scale, steps, moments) < nearest


def network():
    rng = np.random.default_rng(0)
    constants = {
        "shape": np.array([0, -1, 40]),
        "weight": rng.normal(size=(40, 8)).astype(np.float32),
        "last": rng.normal(size=(8, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"], "layer"),
        helper.make_node("MatMul", ["y", "last"], ["logits"], "other"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "F", 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


WINDOWS = [correlated(40, 20, seed).astype(np.float32).ravel() for seed in range(6)]


def test_second_moments_are_sums_of_outer_products():
    frames = np.concatenate(WINDOWS).reshape(-1, 40)
    found = second_moments(network(), ["x"], WINDOWS)
    np.testing.assert_allclose(found["x"], frames.T @ frames, rtol=1e-4, atol=1e-3)
    assert second_moments(network(), [], WINDOWS) == {}
    loud = [window + np.float32(10) for window in WINDOWS]
    found = second_moments(network(), ["x"], loud, about_means=True)
    np.testing.assert_allclose(found["x"], len(frames) * np.cov(frames.T, ddof=0), atol=1e-1)


def test_moments_about_means_that_are_far_larger_than_what_varies():
    """As in a network whose last layers have learned little: no factor could be found of them."""
    means = np.linspace(-3000, 3000, 40, dtype=np.float32)
    heard = [(window.reshape(-1, 40) / 8 + means).ravel() for window in WINDOWS]
    frames = np.concatenate(heard).reshape(-1, 40).astype(np.float64)
    found = second_moments(network(), ["x"], heard, about_means=True)["x"]
    exact = len(frames) * np.cov(frames.T, ddof=0)
    np.testing.assert_allclose(found, exact, atol=1e-5 * exact.max())
    assert np.isfinite(ordered(found)[1]).all()


def quantized(fp32, folder):
    onnx.save(fp32, folder / "fp32.onnx")
    quantize_static(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        WindowReader(WINDOWS),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return onnx.load(folder / "int8.onnx")


def test_the_layers_of_a_graph_are_rounded_again_and_only_those(tmp_path):
    fp32 = network()
    int8 = quantized(fp32, tmp_path)
    before = onnx.ModelProto.FromString(int8.SerializeToString())
    round_weights(fp32, int8, WINDOWS, ["layer"])
    old, new = (
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for model in (before, int8)
    )
    changed = [name for name in old if not np.array_equal(old[name], new[name])]
    assert changed == ["weight_quantized"]
    assert new["weight_quantized"].dtype == np.int8

    def product(model):
        """What the rounded layer gives, from the frames as they are."""
        steps = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        return np.concatenate(WINDOWS).reshape(-1, 40) @ (
            steps["weight_quantized"] * steps["weight_scale"]
        )

    exact = np.concatenate(WINDOWS).reshape(-1, 40) @ numpy_helper.to_array(
        fp32.graph.initializer[1]
    )
    assert np.square(product(int8) - exact).sum() < 0.3 * np.square(product(before) - exact).sum()
    onnxruntime.InferenceSession(int8.SerializeToString(), providers=["CPUExecutionProvider"])


def test_about_means_less_is_left_beside_the_mean(tmp_path):
    fp32, errors = network(), []
    loud = [window + np.float32(10) for window in WINDOWS]
    frames = np.concatenate(loud).reshape(-1, 40)
    exact = frames @ numpy_helper.to_array(fp32.graph.initializer[1])
    for about_means in (False, True):
        int8 = quantized(fp32, tmp_path)
        round_weights(fp32, int8, loud, ["layer"], about_means=about_means)
        found = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
        error = frames @ (found["weight_quantized"] * found["weight_scale"]) - exact
        errors.append([np.square(error).mean(), error.var(axis=0).mean()])
    (all_of_it, beside), (shifted, less) = errors
    assert less < 0.8 * beside
    assert shifted > 2 * all_of_it  # it is for the bias to take that up


@pytest.mark.parametrize("size", [1, 2, 30, 200])
def test_the_factor_is_that_of_the_inverse(size):
    values = np.random.default_rng(size).normal(size=(3 * size, size))
    moments = values.T @ values
    expected = np.linalg.cholesky(np.linalg.inv(moments)).T
    np.testing.assert_allclose(upper_factor(moments), expected, rtol=1e-9, atol=1e-12)


def test_moments_are_held_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(rounding, "HELD_BYTES", 8 * (9 + 16))
    inputs = {"a": 3, "b": 4, "c": 1, "d": 100, "e": 2}
    assert held_at_once(inputs) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert held_at_once({}) == []


def test_parts_round_as_the_whole_does(tmp_path, monkeypatch):
    fp32, found = network(), []
    for limit in (rounding.HELD_BYTES, 1):
        monkeypatch.setattr(rounding, "HELD_BYTES", limit)
        int8 = quantized(fp32, tmp_path)
        round_weights(fp32, int8, WINDOWS, ["layer", "other"])
        found.append(int8.SerializeToString())
    assert found[0] == found[1]
