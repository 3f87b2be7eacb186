import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch.nn.functional import conv1d

from export.frames import over_time
from export.pairs import largest_sum
from export.twice import x86_form
from tests.test_first_layer import operations, run

SIZE = np.float32(0.03)  # of a step of the values


def quantized(kernel, *, channels=4, bias=True, behind=(), **conv):
    """samples -> (N, C, T) -> GELU -> INT8 convolution with rounded sums -> GELU, twice."""
    rng = np.random.default_rng(0)
    constants = {
        "shape": np.array([0, channels, -1]),
        "step": SIZE,
        "zero": np.int8(0),
        "zeros": np.zeros(channels, np.int8),
        "sum_step": np.float32(0.25),
    }
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["x0"]),
        helper.make_node("Gelu", ["x0"], ["y0"]),
    ]
    for n in (0, 1):
        group = conv.get("group", 1)
        constants[f"weight{n}"] = rng.integers(
            -127, 128, (channels, channels // group, kernel), np.int8
        )
        constants[f"size{n}"] = rng.uniform(0.001, 0.002, channels).astype(np.float32)
        constants[f"bias{n}"] = rng.normal(size=channels).astype(np.float32)
        inputs = [f"dq{n}", f"w{n}", f"bias{n}"][: 3 if bias else 2]
        nodes += [
            helper.make_node("QuantizeLinear", [f"y{n}", "step", "zero"], [f"q{n}"], f"q{n}"),
            helper.make_node("DequantizeLinear", [f"q{n}", "step", "zero"], [f"dq{n}"], f"dq{n}"),
            helper.make_node(
                "DequantizeLinear", [f"weight{n}", f"size{n}", "zeros"], [f"w{n}"], axis=0
            ),
            helper.make_node("Conv", inputs, [f"sum{n}"], f"conv{n}", **conv),
            helper.make_node("QuantizeLinear", [f"sum{n}", "sum_step", "zero"], [f"s{n}"]),
            helper.make_node("DequantizeLinear", [f"s{n}", "sum_step", "zero"], [f"x{n + 1}"]),
            helper.make_node("Gelu", [f"x{n + 1}"], [f"y{n + 1}"]),
        ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("y2", TensorProto.FLOAT, [*"NCF"])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def expected(model, samples, pads, **how):
    """What the layers give in double precision, their sums not rounded."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    gelu = torch.nn.functional.gelu
    values = gelu(torch.from_numpy(samples).reshape(len(samples), 4, -1))
    for n in (0, 1):
        steps = torch.from_numpy(np.clip(np.round(values.numpy() / SIZE), -128, 127))
        padded = torch.nn.functional.pad(steps.double() * float(SIZE), pads)
        weight = constants[f"weight{n}"].astype(float) * constants[f"size{n}"][:, None, None]
        bias = torch.from_numpy(constants[f"bias{n}"].astype(float))
        values = gelu(conv1d(padded, torch.from_numpy(weight), bias, **how)).float()
    return values.numpy()


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    time=st.integers(60, 80),
    batch=st.integers(1, 2),
)
def test_int8_products_are_the_convolutions(kernel, stride, dilation, pads, time, batch):
    how = {"strides": [stride], "dilations": [dilation], "pads": [*pads]}
    model = quantized(kernel, **how)
    product = x86_form(model)
    onnx.checker.check_model(product, full_check=True)
    assert "Conv" not in operations(product)
    samples = np.random.default_rng(time).normal(size=(batch, 4 * time)).astype(np.float32)
    wanted = expected(model, samples, pads, stride=stride, dilation=dilation)
    # What float32 decides otherwise is one step of a value of the second convolution.
    np.testing.assert_allclose(run(product, samples), wanted, atol=1.1 * SIZE * 127 * 0.002)


def test_a_convolution_of_one_sample_is_a_plain_product():
    product = x86_form(quantized(1, bias=False))
    assert not {"Conv", "Slice", "Concat", "Add"} & operations(product)


@pytest.mark.parametrize("other", [{"group": 2}, {"auto_pad": "SAME_UPPER"}])
def test_other_int8_convolutions_stay_and_round_their_sums(other):
    model = quantized(3, **other)
    product = x86_form(model)
    assert not over_time(model.graph)
    assert sum(node.op_type == "Conv" for node in product.graph.node) == 2
    assert sum(node.op_type == "QuantizeLinear" for node in product.graph.node) == 4


def test_onnx_runtime_multiplies_frames_as_integers_and_turns_them_once(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        x86_form(quantized(3, strides=[2])).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found.count("MatMulIntegerToFloat") == 2
    assert found.count("Transpose") == 2  # first to last and back; none between, none of weights
    assert not {"QLinearConv", "Conv", "MatMul"} & {*found}


def test_weights_are_stored_once_for_both_graphs():
    model = quantized(3)
    weights = [
        {t.name: t.raw_data for t in one.graph.initializer if t.name.startswith("weight")}
        for one in (model, x86_form(model))
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_pairs_of_weights_are_those_of_the_convolution():
    model = quantized(3)
    assert largest_sum(x86_form(model)) == largest_sum(model) > 128
