import dataclasses
import io
import math
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from edge_ser import AudioError, EngineError, Recognizer, recognizer
from edge_ser.bundle import Bundle
from edge_ser.testing import FakeEngine, expected_logits, make_bundle

RATE = 16_000
LN3 = math.log(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b", fp32=True)


@pytest.fixture(scope="module")
def metadata(folder):
    return dataclasses.replace(Bundle.open(folder).metadata, labels=("calm", "loud"))


def clip(seconds, rate=RATE):
    return np.random.default_rng(0).normal(0, 0.3, round(seconds * rate)).astype(np.float32)


# Windows


@pytest.mark.parametrize(
    ("seconds", "spans"),
    [
        (0.4, [(0, 0.4)]),
        (3.0, [(0, 3)]),
        (3.1, [(0, 3), (1.5, 3.1)]),
        (4.5, [(0, 3), (1.5, 4.5)]),
        (5.0, [(0, 3), (1.5, 4.5), (3, 5)]),
    ],
)
def test_the_spans_of_windows_of_three_seconds(metadata, seconds, spans):
    engine = FakeEngine([0.0, 0.0])
    prediction = Recognizer(metadata, engine).predict(clip(seconds), RATE)
    assert [(window.start_s, window.end_s) for window in prediction.windows] == spans
    assert [call.shape for call in engine.calls] == [
        (1, round((end - start) * RATE)) for start, end in spans
    ]


# Answers


def test_a_prediction_by_hand(metadata):
    engine = FakeEngine([0.0, LN3])
    prediction = Recognizer(metadata, engine).predict(clip(1), RATE)
    assert prediction.label == "loud"
    assert prediction.confidence == pytest.approx(0.75)
    assert prediction.probs == pytest.approx({"calm": 0.25, "loud": 0.75})
    assert (prediction.device, prediction.graph) == ("fake", "fake.onnx")
    (window,) = prediction.windows
    assert (window.label, window.confidence, window.probs) == (
        "loud",
        prediction.confidence,
        prediction.probs,
    )


def test_a_clip_is_the_mean_of_its_windows(metadata):
    engine = FakeEngine([LN3, 0.0], [0.0, 10.0])
    prediction = Recognizer(metadata, engine).predict(clip(4), RATE)
    first, second = 0.75, 1 / (1 + math.exp(10))
    assert [window.label for window in prediction.windows] == ["calm", "loud"]
    assert [window.probs["calm"] for window in prediction.windows] == pytest.approx([first, second])
    assert prediction.probs["calm"] == pytest.approx((first + second) / 2)
    assert prediction.label == "loud"


def test_the_temperature_divides_the_logits(metadata):
    metadata = dataclasses.replace(metadata, temperature=2.0)
    prediction = Recognizer(metadata, FakeEngine([0.0, 2 * LN3])).predict(clip(1), RATE)
    assert prediction.confidence == pytest.approx(0.75)


@pytest.mark.parametrize(("threshold", "uncertain"), [(0.5, False), (0.51, True), (0.0, False)])
def test_a_confidence_below_the_threshold_is_uncertain(metadata, threshold, uncertain):
    metadata = dataclasses.replace(metadata, abstain_below=threshold)
    prediction = Recognizer(metadata, FakeEngine([1.0, 1.0])).predict(clip(1), RATE)
    assert prediction.confidence == 0.5
    assert prediction.uncertain is uncertain


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1),
    st.floats(0.1, 10),
)
def test_probabilities_equal_scipys_softmax(logits, temperature):
    logits = np.array(logits, np.float32)
    found = recognizer.probabilities(logits, temperature)
    expected = softmax(logits.astype(np.float64) / temperature, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_logits_are_those_of_the_windows(metadata):
    logits = Recognizer(metadata, FakeEngine([1.0, 2.0], [3.0, 4.0])).run(clip(4), RATE)[1]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [[1, 2], [3, 4]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(metadata, value):
    with pytest.raises(EngineError) as error:
        Recognizer(metadata, FakeEngine([0.0, value])).predict(clip(1), RATE)
    line = "fake.onnx returned NaN or infinity; is the audio far louder than 1.0?"
    assert str(error.value) == line


def test_a_fault_at_the_end_of_a_clip_is_an_error_and_no_answer(metadata):
    samples = clip(10)
    samples[-1] = np.nan
    with pytest.raises(AudioError) as error:
        Recognizer(metadata, FakeEngine([0.0, 0.0])).predict(samples, RATE)
    line = "the array has NaN or infinity at sample 159999; allowed: finite values"
    assert str(error.value) == line


# With a real graph


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_loaded_bundle_answers_as_worked_out_by_hand(folder, precision):
    samples = clip(4)
    prediction = Recognizer.load(folder, precision=precision, threads=1).predict(samples, RATE)
    windows = [samples[: 3 * RATE], samples[RATE * 3 // 2 :]]
    expected = np.mean([softmax(expected_logits(window, 3)) for window in windows], axis=0)
    assert list(prediction.probs) == ["calm", "lively", "loud"]
    np.testing.assert_allclose(list(prediction.probs.values()), expected, atol=1e-5)


def test_a_path_its_bytes_and_its_samples_give_one_answer(folder, tmp_path):
    samples = np.round(clip(1) * 1000) / np.float32(2**15)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV")
    (tmp_path / "a.wav").write_bytes(file.getvalue())
    loaded = Recognizer.load(folder, threads=1)
    by_array = loaded.predict(samples, RATE)
    assert loaded.predict(file.getvalue()) == by_array
    assert loaded.predict(tmp_path / "a.wav") == by_array


def test_an_hour_is_classified_in_bounded_memory(folder, tmp_path):
    content = 2 * 3600 * RATE
    with (tmp_path / "hour.wav").open("wb") as file:  # silence, sparse on the disk
        file.write(struct.pack("<4sI4s", b"RIFF", content + 36, b"WAVE"))
        file.write(struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16))
        file.write(struct.pack("<4sI", b"data", content))
        file.truncate(44 + content)
    loaded = Recognizer.load(folder, threads=1)
    tracemalloc.start()
    prediction = loaded.predict(tmp_path / "hour.wav")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prediction.windows) == 2399
    assert prediction.windows[-1].end_s == 3600
    assert peak < 6e6  # the hour itself is 230 MB
