import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ser import AudioError, EngineError, Recognizer, Stream
from edge_ser.bundle import Bundle
from edge_ser.samples import sample_paths
from edge_ser.testing import FakeEngine, make_bundle

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b", abstain_below=0.6)


@pytest.fixture(scope="module")
def metadata(folder):
    return Bundle.open(folder).metadata


def stream_of(metadata, *logits):
    return Stream(Recognizer(metadata, FakeEngine(*logits or [[0.0, 0.0, 0.0]])))


def test_events_by_hand(metadata):
    """Windows of 3 s every 1.5 s; softmax of (ln 2, 0, 0) is (1/2, 1/4, 1/4)."""
    stream = stream_of(metadata, [np.log(2), 0, 0], [0, 0, 100])
    assert list(stream.push(np.zeros(3 * RATE - 1, np.float32))) == []
    (first,) = stream.push(np.zeros(1, np.float32))
    assert (first.start_s, first.end_s, first.label) == (0, 3, "calm")
    assert first.confidence == pytest.approx(0.5)
    assert first.uncertain
    assert first.probs == pytest.approx({"calm": 0.5, "lively": 0.25, "loud": 0.25})
    assert (first.device, first.graph) == ("fake", "fake.onnx")
    assert list(stream.push(np.zeros(RATE, np.float32))) == []
    (last,) = stream.finish()
    assert (last.start_s, last.end_s, last.label, last.uncertain) == (1.5, 4, "loud", False)
    assert last.to_json()["probs"] == last.probs


@given(cuts=st.lists(st.integers(1, 7 * RATE - 1), max_size=8), seconds=st.sampled_from([1, 3, 7]))
@settings(max_examples=15, deadline=None)
def test_windows_are_those_of_predict_bit_for_bit_however_the_audio_arrives(cuts, seconds):
    """On one real engine, an embedded model."""
    recognizer = tiny()
    samples = np.random.default_rng(1).normal(0, 0.1, seconds * RATE).astype(np.float32)
    stream = Stream(recognizer)
    blocks = np.split(samples, sorted(cut for cut in set(cuts) if cut < len(samples)))
    events = [event for block in blocks for event in stream.push(block)]
    events += stream.finish()
    windows = recognizer.predict(samples, RATE).windows
    assert [(e.start_s, e.end_s, e.label, e.confidence, e.probs) for e in events] == [
        (w.start_s, w.end_s, w.label, w.confidence, w.probs) for w in windows
    ]


_TINY = []


def tiny():
    if not _TINY:
        _TINY.append(Recognizer.load("tiny", threads=1))
    return _TINY[0]


def test_a_real_clip_is_answered_alike(tmp_path):
    import soundfile

    samples, rate = soundfile.read(sample_paths()[0], dtype="float32")
    assert rate == RATE
    stream = Stream(tiny())
    events = [*stream.push(samples), *stream.finish()]
    assert [e.probs for e in events] == [w.probs for w in tiny().predict(sample_paths()[0]).windows]


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (
            np.zeros(9),
            "the samples are float64 of shape (9,); allowed: float32 of shape (n,), mono",
        ),
        (
            np.zeros((9, 2), np.float32),
            "the samples are float32 of shape (9, 2); allowed: float32 of shape (n,), mono",
        ),
        (
            np.full(9, np.nan, np.float32),
            "the samples have NaN or infinity; allowed: finite values",
        ),
    ],
)
def test_samples_that_are_refused(metadata, samples, line):
    with pytest.raises(AudioError) as error:
        list(stream_of(metadata).push(samples))
    assert str(error.value) == line


@pytest.mark.parametrize("count", [0, 6399])
def test_a_stream_of_less_than_the_least_is_refused(metadata, count):
    stream = stream_of(metadata)
    list(stream.push(np.zeros(count, np.float32)))
    with pytest.raises(AudioError, match=r"ended after 0\.\d\d s; allowed: 0.4 s or more"):
        list(stream.finish())


def test_the_least_is_enough(metadata):
    stream = stream_of(metadata)
    list(stream.push(np.zeros(6400, np.float32)))
    (event,) = stream.finish()
    assert event.end_s == 0.4


def test_logits_that_are_not_finite_are_an_error(metadata):
    with pytest.raises(EngineError, match="returned NaN or infinity"):
        list(stream_of(metadata, [0.0, np.nan, 0.0]).push(np.zeros(3 * RATE, np.float32)))
