import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.turn import turn
from tests.test_upstream import HEADS, SIZE, SPEECH, attention, value


def test_full_precision_stays_as_it_is():
    model, before = attention(), attention()
    turn(model, ["out"], SPEECH[0])
    np.testing.assert_allclose(value(model, "logits"), value(before, "logits"), atol=1e-5)
    assert [node.op_type for node in model.graph.node] == [n.op_type for n in before.graph.node]
    onnx.checker.check_model(model, full_check=True)


def test_each_head_is_turned_by_itself():
    model = attention()
    before = value(model, "heard").reshape(-1, HEADS, SIZE)
    turn(model, ["out"], SPEECH[0])
    after = value(model, "heard").reshape(-1, HEADS, SIZE)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(
        np.linalg.norm(after, axis=2), np.linalg.norm(before, axis=2), rtol=1e-4
    )


def test_a_loud_channel_is_spread_over_its_head():
    model = attention()
    (bias,) = (one for one in model.graph.initializer if one.name == "b")
    loud = numpy_helper.to_array(bias).copy()
    loud[0] = 100
    bias.CopyFrom(numpy_helper.from_array(loud, "b"))
    peaks = np.abs(value(model, "heard")).max(axis=(0, 1))
    turn(model, ["out"], SPEECH[0])
    turned = np.abs(value(model, "heard")).max(axis=(0, 1))
    assert peaks[0] == pytest.approx(100, abs=5)
    assert turned[:SIZE].max() < 95
    assert turned[:SIZE].min() > 5
    assert turned[SIZE:].max() < 20


def test_what_is_read_elsewhere_as_well_is_left_alone():
    model = attention()
    model.graph.node.append(helper.make_node("Abs", ["heard"], ["other"]))
    before = onnx.ModelProto.FromString(model.SerializeToString())
    turn(model, ["out"], SPEECH[0])
    assert model == before


def test_layers_that_stay_float_are_left_alone():
    model = attention()
    turn(model, [], SPEECH[0])
    assert model == attention()
