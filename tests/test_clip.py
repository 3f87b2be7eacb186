import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper

from export.clip import SHARES, clip_ranges, rounding_error
from export.quantize import calibrate
from export.sensitivity import logits_of
from tests.test_smooth import CHANNELS, CONV, MATMUL, network

SAME = [helper.make_node("Identity", ["raw"], ["x"], "same")]


def test_the_error_of_a_few_numbers_is_known():
    frames = np.array([[0.4, 300.0], [1.25, -128.0], [-0.6, 0.0]], np.float32)
    # Steps of 1: 0.4 and -0.6 are off by 0.4, 1.25 by 0.25; 300 is cut off at 127.
    np.testing.assert_allclose(
        rounding_error(frames, 1.0), [0.16 + 0.0625 + 0.16, 173.0**2], rtol=1e-5
    )


@settings(deadline=None)
@given(arrays.arrays(np.float32, (5, 2), elements=st.floats(-100, 100, width=32)))
def test_inside_the_range_no_value_is_off_by_more_than_half_a_step(frames):
    assert (rounding_error(frames, 1.0) <= 5 * 0.25 + 1e-6).all()


def windows(loudest):
    """Speech whose loudest channel has equally frequent values up to 1, and one value beyond."""
    rng = np.random.default_rng(0)
    found = [rng.uniform(-1, 1, CHANNELS * 20000).astype(np.float32) for _ in range(3)]
    found[1][2] = loudest  # the third channel is 50 times as loud as the others
    return found


def clipped(layer, heard):
    """Return the scale of what the layer reads, before and after, and the error of its output."""
    exact = network(SAME, layer)
    int8 = calibrate(exact, heard, [])
    expected = logits_of(exact, heard)
    scales, errors = [], []
    for change in (lambda: None, lambda: clip_ranges(exact, int8, heard, ["layer"])):
        change()
        read = "x" if layer is MATMUL else "turned"
        (quantizer,) = [node for node in int8.graph.node if node.input[0] == read]
        constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
        scales.append(float(constants[quantizer.input[1]]))
        errors.append(np.square(logits_of(int8, heard) - expected).sum())
    return scales, errors


@pytest.mark.parametrize("layer", [MATMUL, CONV])
def test_a_single_far_value_does_not_decide_the_step(layer):
    (before, after), errors = clipped(layer, windows(1.2))
    assert before == pytest.approx(50 * 1.2 / 127.5, rel=0.01)
    assert any(after / before == pytest.approx(share) for share in SHARES[1:])
    assert after >= 50 / 128  # nothing of what is frequent is cut off
    assert errors[1] < errors[0]


@pytest.mark.parametrize("layer", [MATMUL, CONV])
def test_a_range_that_is_used_is_left_as_it_is(layer):
    (before, after), _ = clipped(layer, windows(-1.0))
    assert after == before
