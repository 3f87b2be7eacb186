import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.integers import exact_engine, with_float_products, with_parts_summed
from export.pairs import cuts_off_sums
from export.qdq import unsigned
from export.quantize import calibrate
from export.twice import x86_form
from tests.test_twice import LAYERS, VALUES, convolution, expected, quantized
from tests.test_twice import plain as plain_session

SAMPLES = np.ones((2, 64), np.float32)
WEIGHTS = np.random.default_rng(0).uniform(0.5, 1, (64, 3)).astype(np.float32)


@pytest.fixture
def plain():
    """A product of large weights as the runtime has graphs."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["samples", "weights"], ["logits"], "layer"),
            helper.make_node("Identity", ["logits"], ["embedding"]),
        ],
        "layers",
        [value("samples", TensorProto.FLOAT, ["N", "T"])],
        [value(name, TensorProto.FLOAT, ["N", 3]) for name in ("logits", "embedding")],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def dynamic(plain, tmp_path):
    file = tmp_path / "dynamic.onnx"
    onnx.save(plain, tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", file, per_channel=True, weight_type=QuantType.QInt8)
    return file


@pytest.fixture
def static(plain, tmp_path):
    file = tmp_path / "static.onnx"
    onnx.save(unsigned(calibrate(plain, [SAMPLES[0], -SAMPLES[0]], [])), file)
    return file


def answers(model, samples=SAMPLES):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"samples": samples})[0]


def test_float_products_are_those_of_the_integers(dynamic):
    samples = np.random.default_rng(1).uniform(-1, 1, (5, 64)).astype(np.float32)
    model = onnx.load(dynamic)
    changed = with_float_products(model)
    assert "MatMulInteger" not in [node.op_type for node in changed.graph.node]
    assert "MatMulInteger" in [node.op_type for node in model.graph.node]
    found = answers(changed, samples)
    np.testing.assert_allclose(found, samples @ WEIGHTS, atol=0.1)
    assert np.abs(found - samples @ WEIGHTS).max() > 1e-4  # it is INT8
    if not cuts_off_sums():
        np.testing.assert_allclose(found, answers(model, samples), atol=1e-4)


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_an_engine_answers_rightly_where_sums_are_cut_off(form, request):
    file = request.getfixturevalue(form)
    expected = SAMPLES @ WEIGHTS
    np.testing.assert_allclose(exact_engine(file).run(SAMPLES), expected, rtol=1e-2)
    cut_off = np.abs(answers(onnx.load(file)) - expected).max() > 0.1 * expected.max()
    assert cut_off == cuts_off_sums()


@pytest.mark.parametrize("given_back", [(), ("product",), ("gemm", "bare"), LAYERS])
def test_values_of_two_parts_are_multiplied_once_and_give_the_same(given_back):
    model = x86_form(quantized(), given_back)
    changed = with_parts_summed(model)
    onnx.checker.check_model(changed, full_check=True)
    counts = [
        sum(node.op_type in ("Gemm", "MatMul") for node in one.graph.node)
        for one in (model, changed)
    ]
    assert counts == [len(LAYERS) + len(given_back), len(LAYERS)]
    (found,) = plain_session(changed).run(["logits"], {"samples": VALUES})
    np.testing.assert_allclose(found, expected(given_back), atol=2e-5)


def test_convolutions_of_two_parts_are_multiplied_once():
    model = x86_form(convolution(1)[0], ["conv"])
    changed = with_parts_summed(model)
    onnx.checker.check_model(changed, full_check=True)
    counts = [sum(n.op_type == "MatMul" for n in one.graph.node) for one in (model, changed)]
    assert counts == [2, 1]
    found, wanted = (
        plain_session(one).run(["logits"], {"samples": VALUES})[0] for one in (changed, model)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)
