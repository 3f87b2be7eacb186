import platform

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_ser.engines import has_vnni
from export.pairs import (
    as_weight,
    fit_pairs,
    largest_sum,
    neighbours,
    overflows_here,
    pair_sums,
)
from export.probe import session_of
from export.qdq import unsigned
from export.quantize import calibrate
from export.rounding import ordered, round_rows, round_weights

X86 = platform.machine() in ("x86_64", "AMD64")
SHAPES = {"Conv": (6, 5, 3), "Gemm": (6, 15), "MatMul": (15, 6)}


def node_of(operation):
    attributes = {"transB": 1} if operation == "Gemm" else {}
    return helper.make_node(operation, ["samples", "w"], ["y"], "layer", **attributes)


def sums_of_16_bits(activations, rows):
    """Multiply as VPMADDUBSW and VPADDD do: two products are added in 16 bits."""
    even = len(rows) // 2 * 2
    products = activations.astype(int)[:, :, None] * rows.astype(int)[None]
    pairs = products[:, 0:even:2] + products[:, 1:even:2]
    return pairs.clip(-32768, 32767).sum(axis=1) + products[:, even:].sum(axis=1)


# the arithmetic


def test_only_weights_of_one_sign_add_up():
    rows = np.array([[100, 100, -100], [28, -100, -29], [-127, 3, 0]], np.int8)
    np.testing.assert_array_equal(pair_sums(rows), [[128, 100, 129], [127, 3, 0]])


@settings(max_examples=200, deadline=None)
@given(first=st.integers(-127, 127), second=st.integers(-127, 127))
def test_a_pair_is_cut_off_by_16_bits_where_its_sum_is_above_128(first, second):
    rows = np.array([[first], [second]], np.int8)
    extremes = np.array([[0, 0], [0, 255], [255, 0], [255, 255]], np.uint8)
    cut_off = (sums_of_16_bits(extremes, rows) != extremes.astype(int) @ rows).any()
    assert cut_off == (pair_sums(rows) > 128).any()


@pytest.mark.parametrize("operation", SHAPES)
def test_neighbours_come_back_as_the_layer_reads_them(operation):
    shape = SHAPES[operation]
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    node = node_of(operation)
    rows = neighbours(node, weight)
    assert rows.shape == (15, 6)
    np.testing.assert_array_equal(as_weight(node, rows, shape), weight)


def test_kernels_go_over_the_channels_of_a_convolution_first():
    weight = np.arange(8, dtype=np.float32).reshape(1, 2, 4)  # channels 0 to 3 and 4 to 7
    np.testing.assert_array_equal(neighbours(node_of("Conv"), weight)[:4, 0], [0, 4, 1, 5])


@settings(max_examples=50, deadline=None)
@given(dim=st.integers(1, 300), seed=st.integers(0, 99), pairs=st.booleans())
def test_rounding_by_inputs_leaves_no_pair_that_overflows(dim, seed, pairs):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-1, 1, (dim, 3)).astype(np.float32)
    inputs = rng.normal(size=(20, dim))
    steps = round_rows(weights, np.full(3, 1 / 127), *ordered(inputs.T @ inputs), pairs=pairs)
    assert np.abs(steps.astype(int)).max() <= 127
    if pairs:
        assert pair_sums(steps).max() <= 128
    elif dim > 20:
        assert pair_sums(steps).max() > 128


# whole graphs

GIVEN = {"Conv": (5, 24), "Gemm": (15,), "MatMul": (24, 15)}


@pytest.fixture(params=SHAPES)
def model(request):
    """A layer whose weights are large and all positive, and one behind it."""
    rng = np.random.default_rng(0)
    node = node_of(request.param)
    node.output[0] = "middle"
    behind = helper.make_node(request.param, ["middle", "w2"], ["y"], "behind")
    second = {"Conv": (4, 6, 1), "Gemm": (6, 4), "MatMul": (6, 4)}[request.param]
    weights = {"w": SHAPES[request.param], "w2": second}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, behind],
        "layers",
        [value("samples", TensorProto.FLOAT, ["N", *GIVEN[request.param]])],
        [value("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(rng.uniform(0.5, 1, shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def windows(model):
    """Windows that reach both ends of their range."""
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return [np.full(shape, sign, np.float32) for sign in (1, -1)]


def answers(model, windows, *, exactly=False):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1" if exactly else "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.stack([session.run(None, {"samples": one[None]})[0] for one in windows])


def weights_of(model):
    layers = {node.name: node for node in model.graph.node}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scaled = {n.output[0]: n.input for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for name in ("layer", "behind"):
        steps, scale, _ = scaled[layers[name].input[1]]
        yield neighbours(layers[name], constants[steps]), constants[scale]


@pytest.mark.parametrize("by_inputs", [False, True])
def test_fitted_weights_give_the_same_sums_on_every_x86(model, windows, by_inputs):
    int8 = calibrate(model, windows, [])
    fit_pairs(model, int8, ["layer", "behind"])
    if by_inputs:
        round_weights(model, int8, windows, ["layer", "behind"], pairs=True)
    found = answers(unsigned(int8), windows)
    np.testing.assert_allclose(found, answers(unsigned(int8), windows, exactly=True), rtol=1e-2)
    np.testing.assert_allclose(found, answers(model, windows), rtol=3e-2)
    assert 120 <= largest_sum(int8) <= 128
    assert not overflows_here(int8)


def test_steps_grow_only_where_pairs_overflow(model, windows):
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    rows = neighbours(model.graph.node[0], numpy_helper.to_array(weight)).copy()
    rows[:, 0] = [1.0, 0.0, *[0.4] * 13]
    quiet = as_weight(model.graph.node[0], rows, weight.dims)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(quiet), "w"))
    int8 = calibrate(model, windows, [])
    before, size = next(weights_of(int8))
    fit_pairs(model, int8, ["layer"])
    after, wider = next(weights_of(int8))
    assert wider[0] == size[0]
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_allclose(wider[1:] / size[1:], pair_sums(before).max(axis=0)[1:] / 127, 1e-2)
    assert (120 <= pair_sums(after).max(axis=0)).all()
    assert pair_sums(after).max() <= 128


def test_a_graph_of_which_this_processor_cuts_off_sums_is_computed_in_float(model, windows):
    int8 = calibrate(model, windows, [])
    assert overflows_here(int8) == (X86 and not has_vnni())
    expected = answers(model, windows)
    cut_off = np.abs(answers(unsigned(int8), windows) - expected).max() > 0.1 * expected.max()
    assert cut_off == overflows_here(unsigned(int8))
    session = session_of(unsigned(int8))
    found = [session.run(None, {"samples": window[None]})[0] for window in windows]
    np.testing.assert_allclose(found, expected, rtol=3e-2)
