import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edge_ser.bundle import MODELS
from export.adopt import adopt
from export.errors import RecipeError
from export.half import half, make_halves
from export.quantize import quantize, write_int8
from tests.speech_corpus import voice
from tests.test_own import loudness

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
RNG = np.random.default_rng(0)


def write(file, nodes, constants, opset=20):
    """Write a graph from samples to logits and embedding, (N, C) both."""
    values = [
        helper.make_tensor_value_info(name, FLOAT, ["N", size])
        for name, size in (("samples", "T"), ("logits", None), ("embedding", None))
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(v, getattr(v, "dtype", np.float32)), name)
        for name, v in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10),
        file,
    )
    return file


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), output.split(), output, **attributes)


def random(*shape):
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


def convolutional(file):
    """Write what speech networks are made of."""
    nodes = [
        node("Unsqueeze", "samples one", "raw"),
        node("Conv", "raw first", "heard", strides=[20]),
        node("Tanh", "heard", "bent"),
        node("Conv", "bent second bias", "mixed"),
        node("Transpose", "mixed", "frames", perm=[0, 2, 1]),
        node("LayerNormalization", "frames gain offset", "even"),
        node("MatMul", "even query", "asked"),
        node("Transpose", "even", "turned", perm=[0, 2, 1]),
        node("MatMul", "asked turned", "scores"),
        node("Softmax", "scores", "shares"),
        node("MatMul", "shares even", "attended"),
        node("Add", "even attended", "sum"),
        node("ReduceMean", "sum time", "pooled", keepdims=0),
        node("Add", "pooled small", "shifted"),
        node("Gemm", "shifted last", "logits"),
        node("Identity", "logits", "embedding"),
    ]
    constants = {
        "one": np.array([1]), "time": np.array([1]), "first": random(4, 1, 40),
        "second": random(6, 4, 3), "bias": random(6), "gain": 1 + random(6), "offset": random(6),
        "query": random(6, 6), "small": np.full(6, 1e-5, np.float32), "last": random(6, 3),
    }  # fmt: skip
    return write(file, nodes, constants)


def windows():
    return [voice(900.0, 120.0 + 40 * n, 0.4, n) for n in range(2)]


def types(model):
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.output, *graph.input)
    }


def answers(model, names=("logits",)):
    network = ReferenceEvaluator(model)
    return [network.run(list(names), {"samples": window[None]}) for window in windows()]


def test_what_is_half_and_what_is_not(tmp_path):
    model = half(convolutional(tmp_path / "m.onnx"), windows())
    found = types(model)
    front = {"samples", "raw", "heard", "bent"}
    sums = {"even", "pooled", "shifted"}  # the last adds 1e-5, and goes with what it adds it to
    wide = {*front, *sums, "turned", "logits", "embedding"}
    layers = {"mixed", "frames", "asked", "scores", "shares", "attended", "sum"}
    assert {name: found[name] for name in wide | layers} == {
        **dict.fromkeys(wide, FLOAT),
        **dict.fromkeys(layers, HALF),
    }


def test_a_value_is_cast_once_and_only_where_it_has_to_be(tmp_path):
    model = half(convolutional(tmp_path / "m.onnx"), windows())
    casts = [(n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "Cast"]
    assert sorted(casts) == [
        ("bent", "bent.half"),
        ("embedding.half", "embedding"),
        ("even", "even.half"),  # for three readers
        ("frames", "frames.float"),
        ("logits.half", "logits"),
        ("shifted", "shifted.half"),
        ("sum", "sum.float"),
        ("turned", "turned.half"),
    ]


def test_constants_are_rounded_where_they_meet_half_and_kept_where_they_do_not(tmp_path):
    file = convolutional(tmp_path / "m.onnx")
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in half(file, windows()).graph.initializer}
    rounded = {"second", "bias", "query", "last"}
    assert set(after) == set(before) - rounded | {f"{name}.half" for name in rounded}
    for name, value in after.items():
        expected = before[name.removesuffix(".half")]
        expected = expected.astype(np.float16) if name.endswith(".half") else expected
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def test_the_answers_are_those_of_full_precision(tmp_path):
    file = convolutional(tmp_path / "m.onnx")
    for exact, rounded in zip(
        answers(onnx.load(file)), answers(half(file, windows())), strict=True
    ):
        assert rounded[0].dtype == np.float32
        np.testing.assert_allclose(rounded[0], exact[0], atol=2e-3)
        assert not np.array_equal(rounded[0], exact[0])


@settings(max_examples=40, deadline=None)
@given(exponent=st.floats(-8, 8), inverse=st.floats(-8, 8))
def test_no_magnitude_is_lost_in_half(tmp_path_factory, exponent, inverse):
    gain, back = (np.float32(10.0**power) for power in (exponent, inverse))
    nodes = [
        node("Abs", "samples", "magnitude"),
        node("ReduceMean", "magnitude axis", "level"),
        node("MatMul", "level weights", "wide"),
        node("MatMul", "wide mixing", "mixed"),
        node("Mul", "mixed back", "scaled"),
        node("Identity", "scaled", "logits"),
        node("Neg", "scaled", "embedding"),
    ]
    constants = {"axis": np.array([1]), "weights": gain * (0.1 + np.abs(random(1, 8)))}
    constants |= {"mixing": 0.1 + np.abs(random(8, 3)), "back": np.array(back)}
    file = write(tmp_path_factory.mktemp("gain") / "m.onnx", nodes, constants)
    model = half(file, windows())
    types(model)
    for exact, rounded in zip(answers(onnx.load(file)), answers(model), strict=True):
        np.testing.assert_allclose(rounded[0], exact[0], rtol=5e-3)


def test_a_logarithm_of_next_to_nothing_and_a_mask_stay_float(tmp_path):
    nodes = [
        node("MatMul", "samples_wide weights", "power"),
        node("Abs", "power", "positive"),
        node("Clip", "positive least", "bounded"),
        node("Log", "bounded", "heard"),
        node("Where", "known heard never", "masked"),
        node("Softmax", "masked", "shares"),
        node("MatMul", "shares last", "logits"),
        node("Neg", "logits", "embedding"),
    ]
    nodes.insert(0, node("Slice", "samples start stop axis", "samples_wide"))
    constants = {
        "start": np.array([0]), "stop": np.array([8]), "axis": np.array([1]),
        "weights": np.eye(8, dtype=np.float32), "least": np.array(1e-10, np.float32),
        "known": np.arange(8) < 5, "never": np.array(np.finfo(np.float32).min),
        "last": random(8, 3),
    }  # fmt: skip
    file = write(tmp_path / "m.onnx", nodes, constants)
    model = half(file, windows())
    found = types(model)
    for name in ("bounded", "masked", "shares"):
        assert found[name] == FLOAT
    assert found["power"] == found["logits.half"] == HALF
    for exact, rounded in zip(answers(onnx.load(file)), answers(model), strict=True):
        np.testing.assert_allclose(rounded[0], exact[0], atol=2e-3)


def test_what_an_attribute_or_the_operator_tells_to_be_float_stays_so(tmp_path):
    nodes = [
        node("Shape", "samples", "shape"),
        node("Cast", "shape", "sizes", to=FLOAT),
        node("Constant", "", "factor", value_float=0.01),
        node("ConstantOfShape", "three", "ones", value=numpy_helper.from_array(np.ones(1, "f4"))),
        node("Range", "zero ten one", "steps"),
        node("MatMul", "samples_wide weights", "mixed"),
        node("Mul", "mixed factor", "scaled"),
        node("Mul", "scaled ones", "same"),
        node("MatMul", "steps last", "tail"),
        node("Add", "same tail", "sum"),
        node("Gather", "sizes second", "length", axis=0),
        node("Div", "sum length", "logits"),
        node("Neg", "logits", "embedding"),
    ]
    nodes.insert(0, node("Slice", "samples start stop axis", "samples_wide"))
    constants = {
        "start": np.array([0]), "stop": np.array([8]), "axis": np.array([1]),
        "three": np.array([3]), "zero": np.array(0, "f4"), "ten": np.array(10, "f4"),
        "one": np.array(1, "f4"), "weights": random(8, 3), "last": random(10, 3),
        "second": np.array(1),
    }  # fmt: skip
    file = write(tmp_path / "m.onnx", nodes, constants)
    model = half(file, windows())
    found = types(model)
    for name in ("sizes", "factor", "ones", "steps"):
        assert found[name] == FLOAT
    for name in ("mixed", "scaled", "same", "tail", "sum"):
        assert found[name] == HALF
    for exact, rounded in zip(answers(onnx.load(file)), answers(model), strict=True):
        np.testing.assert_allclose(rounded[0], exact[0], rtol=1e-2, atol=1e-6)


def signed(file, *, opset=20, scale=0.01):
    """Write a layer with Q/DQ."""
    nodes = [
        node("Abs", "samples", "magnitude"),
        node("ReduceMean", "magnitude axis", "level", **({} if opset >= 18 else {"axes": [1]})),
        node("MatMul", "level widening", "wide"),
        node("QuantizeLinear", "wide scale zero", "steps"),
        node("DequantizeLinear", "steps scale zero", "rounded"),
        node("DequantizeLinear", "weights scales zeros", "weight", axis=1),
        node("MatMul", "rounded weight", "product"),
        node("Tanh", "product", "logits"),
        node("Neg", "product", "embedding"),
    ]
    constants = {
        "axis": np.array([1]), "widening": 1 + np.abs(random(1, 8)), "scale": np.array(0.01),
        "zero": np.array(0, np.int8), "weights": RNG.integers(-127, 128, (8, 3)).astype(np.int8),
        "scales": np.array([0.004, 0.005, scale]), "zeros": np.zeros(3, np.int8),
    }  # fmt: skip
    for name in ("scale", "scales"):
        constants[name] = constants[name].astype(np.float32)
    return write(file, nodes, constants, opset)


def test_scales_are_half_and_int8_weights_stay_what_they_are(tmp_path):
    file = signed(tmp_path / "m.onnx")
    model = half(file, windows())
    found = types(model)
    assert found["rounded"] == found["weight"] == found["product"] == HALF
    before, after = onnx.load(file).graph, model.graph
    weights = [next(t for t in g.initializer if t.name == "weights") for g in (before, after)]
    assert weights[0] == weights[1]
    kinds = {t.name: t.data_type for t in after.initializer}
    assert kinds["scale.half"] == kinds["scales.half"] == HALF
    assert not {"scale", "scales"} & set(kinds)


@pytest.mark.parametrize(("scale", "kind"), [(2.0**-20, HALF), (1.03 * 2.0**-20, FLOAT)])
def test_a_scale_that_half_cannot_tell_keeps_its_layer_in_float(tmp_path, scale, kind):
    # Below 2**-14 half has the same step everywhere: 2**-24.
    found = types(half(signed(tmp_path / "m.onnx", scale=scale), windows()))
    names = ("rounded", "weight", "product")
    assert [found[name] for name in names] == [kind] * 3


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_shipped_int8_is_hardly_changed_and_shares_its_weights(tmp_path, name):
    file = MODELS / name / "model_int8.onnx"
    model = half(file, windows())
    before = {t.name: t for t in onnx.load(file, load_external_data=False).graph.initializer}
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert outside
    for tensor in outside:
        assert tensor == before[tensor.name]
    weights = {n for n, t in before.items() if t.data_type == TensorProto.INT8 and t.external_data}
    assert weights == {t.name for t in outside if t.data_type == TensorProto.INT8}
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert (
        sum(len(t.raw_data) for t in inside)
        < 0.05 * (file.parent / "model_int8.bin").stat().st_size
    )


def test_a_graph_that_is_too_old_or_branches_is_refused(tmp_path):
    old = signed(tmp_path / "old.onnx", opset=18)
    with pytest.raises(RecipeError) as fault:
        half(old, windows())
    assert str(fault.value) == (
        "INT8 beside half needs opset 19, the graph has 18; export the model again with a later one"
    )
    value = helper.make_tensor_value_info("one_side", FLOAT, None)
    side = helper.make_graph([node("Neg", "samples", "one_side")], "side", [], [value])
    nodes = [
        node("If", "yes", "logits", then_branch=side, else_branch=side),
        node("Neg", "logits", "embedding"),
    ]
    file = write(tmp_path / "if.onnx", nodes, {"yes": np.array(True)})
    with pytest.raises(RecipeError, match="If is no plain ONNX operator, or branches"):
        half(file, windows())


def test_the_stage_writes_what_it_can_and_says_what_it_cannot(tmp_path, capsys, monkeypatch):
    adopt(loudness(tmp_path / "mine.onnx"), ("a", "b", "c"), {}, tmp_path / "model.onnx")
    write_int8(quantize(onnx.load(tmp_path / "model.onnx"), windows())[1], tmp_path)
    assert make_halves(tmp_path, windows(), windows()) == {"model_fp16.onnx": 1.0}
    assert not (tmp_path / "model_int8_fp16.onnx").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "half: model_fp16.onnx keeps the label of 100.0% of the judged windows"
    assert lines[1].startswith("half: no model_int8_fp16.onnx: INT8 beside half needs opset 19")
    monkeypatch.setattr("export.half.ENOUGH_EQUAL", 1.01)  # nothing reaches that
    assert make_halves(tmp_path, windows(), windows()) == {}
    assert not (tmp_path / "model_fp16.onnx").exists()
    assert "half: no model_fp16.onnx: allowed is 101% or more" in capsys.readouterr().out
