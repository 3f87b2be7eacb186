import sys

import numpy as np
import pytest

from edge_ser import Recognizer
from edge_ser.bundle import Bundle
from edge_ser.engines import open_engine
from edge_ser.engines.fallback import FallbackEngine
from edge_ser.errors import DeviceError, EngineError, MissingDependency
from edge_ser.testing import FakeEngine, expected_logits, make_bundle

SAMPLES = np.full((1, 6400), 0.5, np.float32)


class Failing(FakeEngine):
    """An engine that is lost after some runs, as a GPU is."""

    device, graph = "gpu", "model_int8.onnx"

    def __init__(self, runs):
        super().__init__([1, 0])
        self.runs = runs

    def run(self, samples):
        if len(self.calls) == self.runs:
            raise EngineError("CUDA: the GPU is lost")
        return super().run(samples)

    def close(self):
        super().close()
        raise EngineError("CUDA: the GPU is still lost")


def test_it_goes_on_in_mid_stream_and_says_so(caplog):
    first, second = Failing(2), FakeEngine([0, 1])
    engine = FallbackEngine(lambda: first, lambda: second)
    assert [engine.run(SAMPLES).argmax() for _ in range(2)] == [0, 0]
    assert (engine.device, engine.graph) == ("gpu", "model_int8.onnx")
    assert not caplog.records
    assert [engine.run(SAMPLES).argmax() for _ in range(2)] == [1, 1]
    assert (engine.device, engine.graph) == ("fake", "fake.onnx")
    assert caplog.messages == ["CUDA: the GPU is lost; from now on fake.onnx runs on fake"]
    assert len(second.calls) == 2  # the window that failed was not lost
    assert first.closed
    engine.close()
    assert second.closed


def test_the_second_one_has_no_third():
    engine = FallbackEngine(lambda: Failing(0), lambda: Failing(0))
    with pytest.raises(EngineError, match=r"^CUDA: the GPU is lost$"):
        engine.run(SAMPLES)
    with pytest.raises(EngineError):
        engine.run(SAMPLES)


def test_what_is_asked_for_without_tensorrt(tmp_path, monkeypatch, caplog):
    folder = make_bundle(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependency, match=r"TensorRT is not installed"):
        Recognizer.load(folder, engine="tensorrt")
    assert not caplog.records
    recognizer = Recognizer.load(folder, engine="tensorrt", fallback="onnx")
    assert recognizer.engine.device == "cpu"
    (line,) = caplog.messages
    assert line.startswith("TensorRT is not installed")
    assert line.endswith(f"; from now on {recognizer.engine.graph} runs on cpu")
    np.testing.assert_allclose(
        recognizer.engine.run(SAMPLES)[0], expected_logits(SAMPLES[0], 3), rtol=1e-5
    )


def test_without_a_driver_nothing_falls_back_by_itself(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this machine")
    from cuda.bindings import runtime

    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match=r"use --engine onnx"):
        open_engine(Bundle.open(make_bundle(tmp_path / "b")), engine="tensorrt")


@pytest.mark.parametrize("asked", [{"engine": "tvm"}, {"fallback": "cpu"}])
def test_engines_that_are_not_known(tmp_path, asked):
    with pytest.raises(EngineError, match=r"allowed: onnx or tensorrt, and 'onnx' or None"):
        open_engine(Bundle.open(make_bundle(tmp_path / "b")), **asked)
