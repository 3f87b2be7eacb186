import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.functional import conv1d

from export.probe import session_of
from export.twice import REST, x86_form

RNG = np.random.default_rng(0)
SCALE = np.float32(0.05)
LAYERS = ("product", "gemm", "bare")
VALUES = RNG.uniform(-6.3, 6.3, (20, 8)).astype(np.float32)  # 6.35 is the largest of all steps
WEIGHTS = {name: RNG.integers(-127, 128, (8, 4), np.int8) for name in LAYERS}
SCALES = {name: RNG.uniform(0.01, 0.02, 4).astype(np.float32) for name in LAYERS}
BIASES = {name: RNG.normal(size=4).astype(np.float32) for name in ("product", "gemm")}


def quantized():
    """Three INT8 layers read the same values: a MatMul and its bias, a Gemm, and a MatMul alone."""
    constants = {"scale": SCALE, "zero": np.int8(0), "zeros": np.zeros(4, np.int8)}
    constants |= {f"{name}_weight": array for name, array in WEIGHTS.items()}
    constants |= {f"{name}_scale": array for name, array in SCALES.items()}
    constants |= {f"{name}_bias": array for name, array in BIASES.items()}
    constants["gemm_weight"] = np.ascontiguousarray(WEIGHTS["gemm"].T)
    nodes = [
        helper.make_node("QuantizeLinear", ["samples", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "x"),
        *(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}_weight", f"{name}_scale", "zeros"],
                [f"{name}_w"],
                axis=0 if name == "gemm" else 1,
            )
            for name in LAYERS
        ),
        helper.make_node("MatMul", ["x", "product_w"], ["sum"], "product"),
        helper.make_node("Add", ["sum", "product_bias"], ["product_out"]),
        helper.make_node("Gemm", ["x", "gemm_w", "gemm_bias"], ["gemm_out"], "gemm", transB=1),
        helper.make_node("MatMul", ["x", "bare_w"], ["bare_out"], "bare"),
        helper.make_node("Concat", [f"{name}_out" for name in LAYERS], ["logits"], axis=1),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "three",
        [tensor("samples", TensorProto.FLOAT, ["n", 8])],
        [tensor("logits", TensorProto.FLOAT, ["n", 12])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def expected(given_back):
    """What the layers give, in double precision."""
    first = np.clip(np.round(VALUES / SCALE), -128, 127) * SCALE
    step = SCALE / np.float32(REST)
    left = np.clip(np.round((VALUES - first) / step), -128, 127).astype(float) * step
    found = []
    for name in LAYERS:
        weight = WEIGHTS[name].astype(float) * SCALES[name]
        values = first + (left if name in given_back else 0)
        found.append(values.astype(float) @ weight + BIASES.get(name, 0))
    return np.concatenate(found, axis=1)


def plain(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("given_back", [(), ("product",), ("gemm", "bare"), LAYERS])
def test_values_are_multiplied_in_two_parts(given_back):
    model = x86_form(quantized(), given_back)
    onnx.checker.check_model(model, full_check=True)
    for session in (plain(model), session_of(model)):
        (found,) = session.run(["logits"], {"samples": VALUES})
        np.testing.assert_allclose(found, expected(given_back), atol=2e-5)
    parts = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(parts) == (2 if given_back else 1)  # layers that read the same values share them


def test_values_have_sixteen_bits_then():
    exact = np.concatenate(
        [VALUES @ (WEIGHTS[n].astype(float) * SCALES[n]) + BIASES.get(n, 0) for n in LAYERS], axis=1
    )
    once, twice = (np.abs(expected(given) - exact).max() for given in ((), LAYERS))
    assert twice < once / 100


def test_activations_are_unsigned_and_weights_are_held_once():
    model = x86_form(quantized(), LAYERS)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].data_type == TensorProto.UINT8
    weights = [tensor for tensor in constants.values() if len(tensor.dims) == 2]
    assert len(weights) == len(LAYERS)


def test_the_signed_graph_is_left_as_it_is():
    model = quantized()
    x86_form(model, LAYERS)
    assert model == quantized()


def convolution(group):
    """Samples, as two channels of four, and an INT8 convolution of three; sums are rounded."""
    weight = RNG.integers(-127, 128, (4, 2 // group, 3), np.int8)
    constants = {
        "scale": SCALE,
        "zero": np.int8(0),
        "weight": weight,
        "weight_scale": SCALES["bare"],
        "zeros": np.zeros(4, np.int8),
        "shape": np.array([-1, 2, 4], np.int64),
        "sum_scale": np.float32(0.5),
    }
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["channels"]),
        helper.make_node("QuantizeLinear", ["channels", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "x"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["sum"], "conv", group=group),
        helper.make_node("QuantizeLinear", ["sum", "sum_scale", "zero"], ["sum_q"], "sum_q"),
        helper.make_node("DequantizeLinear", ["sum_q", "sum_scale", "zero"], ["sum_dq"], "sum_dq"),
        helper.make_node("Flatten", ["sum_dq"], ["logits"]),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "conv",
        [tensor("samples", TensorProto.FLOAT, ["n", 8])],
        [tensor("logits", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9), weight


@pytest.mark.parametrize("group, given_back", [(1, []), (1, ["conv"]), (2, ["conv"])])
def test_convolutions(group, given_back):
    """Given back, one in groups multiplies float values: its INT8 kernel would round the sums."""
    model, weight = convolution(group)
    found = x86_form(model, given_back)
    onnx.checker.check_model(found, full_check=True)
    (logits,) = session_of(found).run(["logits"], {"samples": VALUES})
    values = VALUES.astype(float)
    if not given_back:
        values = np.clip(np.round(VALUES / SCALE), -128, 127).astype(float) * SCALE
    wide = torch.from_numpy(weight * SCALES["bare"].reshape(4, 1, 1).astype(float))
    sums = conv1d(torch.from_numpy(values.reshape(-1, 2, 4)), wide, groups=group)
    tolerance = 3 * 2 * 127 * 0.02 * SCALE / REST / 2 if group == 1 and given_back else 1e-4
    np.testing.assert_allclose(logits, sums.reshape(len(VALUES), -1), atol=tolerance)


def test_a_convolution_in_groups_rounds_its_sums():
    model, _ = convolution(2)
    (logits,) = session_of(x86_form(model)).run(["logits"], {"samples": VALUES})
    np.testing.assert_array_equal(logits, np.round(logits / 0.5) * 0.5)
