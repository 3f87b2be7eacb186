import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.integers import exact_engine, with_float_products
from export.pairs import cuts_off_sums
from export.qdq import unsigned
from export.quantize import calibrate

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
