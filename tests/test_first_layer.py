import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.first_layer import multiply_samples
from export.qdq import drop_unused
from export.twice import x86_form

OUT = 7
EPSILON = 2e-5


def network(kernel=10, *, channels=1, bias=True, perm=(0, 2, 1), read_twice=False, **conv):
    """samples (N, T) -> convolution -> channels last; with perm None, -> instance normalization."""
    rng = np.random.default_rng(0)
    conv.setdefault("strides", [5])
    constants = {
        "shape": np.array([0, channels, -1]),
        "kernel": rng.normal(size=(OUT, channels, kernel)).astype(np.float32),
        "bias": rng.normal(size=OUT).astype(np.float32),
        "scale": rng.uniform(0.5, 2, OUT).astype(np.float32),
        "mean": rng.normal(size=OUT).astype(np.float32),
    }
    inputs = ["x", "kernel", "bias"] if bias else ["x", "kernel"]
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["x"]),
        helper.make_node("Conv", inputs, ["y"], "conv", **conv),
        helper.make_node("Transpose", ["y"], ["frames"], perm=perm)
        if perm
        else helper.make_node(
            "InstanceNormalization", ["y", "scale", "mean"], ["frames"], epsilon=EPSILON
        ),
    ]
    outputs = ["frames", "y"] if read_twice else ["frames"]
    if read_twice:
        nodes.append(helper.make_node("Neg", ["y"], ["z"]))
        outputs = ["frames", "z"]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info(one, TensorProto.FLOAT, [*"ABC"]) for one in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model, samples):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"samples": samples})[0]


def changed(model):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    multiply_samples(model.graph)
    drop_unused(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def operations(model):
    return {node.op_type for node in model.graph.node}


@settings(max_examples=40, deadline=None)
@given(
    stride=st.integers(1, 5),
    strides=st.integers(1, 3),
    bias=st.booleans(),
    more=st.integers(0, 23),
    batch=st.integers(1, 3),
)
def test_products_of_frames_are_the_convolution(stride, strides, bias, more, batch):
    kernel = stride * strides
    model = network(kernel, bias=bias, strides=[stride])
    product = changed(model)
    assert not {"Conv", "Transpose"} & operations(product)
    shape = (batch, kernel + more)
    samples = np.random.default_rng(more).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(run(product, samples), run(model, samples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"kernel": 9}, id="kernel of 9 by 5"),
        pytest.param({"channels": 2}, id="two channels"),
        pytest.param({"perm": [2, 0, 1]}, id="turned otherwise"),
        pytest.param({"pads": [3, 3]}, id="padded"),
        pytest.param({"auto_pad": "SAME_UPPER"}, id="padded, unsaid"),
        pytest.param({"dilations": [2]}, id="dilated"),
        pytest.param({"read_twice": True}, id="read twice"),
    ],
)
def test_other_convolutions_stay(other):
    model = network(**other)
    assert changed(model).graph.node == model.graph.node


def test_the_graph_for_x86_multiplies_frames():
    assert "Conv" not in operations(x86_form(network()))


def test_a_convolution_that_ends_the_graph_or_has_computed_weights_stays():
    model = network()
    del model.graph.node[-1]
    model.graph.output[0].name = "y"
    assert operations(changed(model)) == {"Reshape", "Conv"}
    model = network()
    model.graph.node.insert(0, helper.make_node("Neg", ["kernel"], ["negative"]))
    model.graph.node[2].input[1] = "negative"
    assert "Conv" in operations(changed(model))


def normalised(model, samples):
    """Convolution and normalization over time, by torch in double precision."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    kernel, scale, mean = (
        torch.from_numpy(constants[name].astype(float)) for name in ("kernel", "scale", "mean")
    )
    sums = torch.nn.functional.conv1d(
        torch.from_numpy(samples.astype(float))[:, None], kernel, stride=5
    )
    norm = torch.nn.functional.instance_norm
    return norm(sums, weight=scale, bias=mean, eps=EPSILON).numpy()


@settings(max_examples=40, deadline=None)
@given(
    bias=st.booleans(), time=st.integers(40, 90), batch=st.integers(1, 3), level=st.floats(-4, 2)
)
def test_a_normalization_over_time_goes_into_the_weights(bias, time, batch, level):
    model = network(perm=None, bias=bias)
    product = changed(model)
    assert not {"Conv", "InstanceNormalization"} & operations(product)
    noise = np.random.default_rng(time).normal(size=(batch, time))
    samples = (10**level * noise + 0.3).astype(np.float32)
    wanted = normalised(model, samples)
    # As far as float32 goes: the mean of the samples is the larger, the softer they are.
    atol = 2e-6 * (1 + 10**-level)
    np.testing.assert_allclose(run(product, samples), wanted, rtol=1e-5, atol=atol)


def test_silence_is_the_mean():
    found = run(changed(network(perm=None)), np.full((2, 60), 0.25, np.float32))
    mean = numpy_helper.to_array(network().graph.initializer[-1])
    np.testing.assert_array_equal(found, np.broadcast_to(mean[:, None], found.shape))


def test_kernels_that_cancel_what_is_loud_are_normalised_as_exactly_as_before():
    """The variances of their sums are a ten-millionth of those of the samples."""
    model = network(perm=None)
    kernel = np.zeros((OUT, 1, 10), np.float32)
    kernel[:, 0, :4] = [-1, 3, -3, 1]
    kernel[:, 0, 4:] = 1e-4 * np.random.default_rng(1).normal(size=(OUT, 6))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    time = np.arange(4000)
    samples = 30 * np.sin(2 * np.pi * time / 400) + 1e-2 * np.sin(time)
    samples = samples.astype(np.float32)[None]
    wanted = normalised(model, samples)
    errors = [np.abs(run(one, samples) - wanted).max() for one in (changed(model), model)]
    assert errors[0] < 3 * errors[1] < 0.01


@pytest.mark.parametrize("name", ["scale", "mean"])
def test_a_normalization_by_computed_numbers_stays(name):
    model = network(perm=None)
    model.graph.node.insert(0, helper.make_node("Neg", [name], ["negative"]))
    place = list(model.graph.node[3].input).index(name)
    model.graph.node[3].input[place] = "negative"
    assert {"Conv", "InstanceNormalization"} <= operations(changed(model))
