"""The TensorRT engine on a GPU that is not there; its compiler is real in test_build.py."""

import inspect
import re
import subprocess
import sys
import time
import zipfile
from multiprocessing.pool import ThreadPool

import cuda.bindings
import numpy as np
import pytest
from cuda.bindings import runtime as real_runtime
from hypothesis import given
from hypothesis import strategies as st

from edge_ser.bundle import Bundle
from edge_ser.engines import build
from edge_ser.engines.cuda import Cuda
from edge_ser.engines.layers import summary
from edge_ser.engines.tensorrt import TensorrtEngine, open_tensorrt
from edge_ser.errors import BundleError, DeviceError, EngineError, MissingDependency
from edge_ser.testing import expected_logits, make_bundle
from tests.fake_gpu import FakeRuntime, fake_tensorrt

ERRORS = real_runtime.cudaError_t


class Machine:
    """A GPU, its TensorRT, and a bundle."""

    def __init__(self, monkeypatch, folder, **gpu):
        self.patch, self.folder = monkeypatch, folder
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.bundle = Bundle.open(make_bundle(folder / "b", fp32=True))
        self.renew(**gpu)

    def renew(self, *, version="10.3.0", **gpu):
        """Go on with another GPU, or another version of TensorRT."""
        self.gpu = FakeRuntime(**gpu)
        self.trt = fake_tensorrt(self.gpu, version)
        self.patch.setattr(cuda.bindings, "runtime", self.gpu)
        self.patch.setitem(sys.modules, "tensorrt", self.trt)

    def open(self, **how):
        return open_tensorrt(self.bundle, **how)


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def machine(request, monkeypatch, tmp_path):
    found = Machine(monkeypatch, tmp_path, integrated=request.param)
    yield found
    assert found.trt.breaches == []


@pytest.fixture
def orin(monkeypatch, tmp_path):
    found = Machine(monkeypatch, tmp_path, integrated=True)
    yield found
    assert found.trt.breaches == []


def speech(rows, seconds, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.3, (rows, round(seconds * 16_000))).astype(np.float32)


def answers(samples):
    return np.stack([expected_logits(row, 3) for row in samples])


def test_it_computes_and_frees_everything(machine):
    engine = machine.open()
    try:
        for seed in range(3):
            samples = speech(1, 3, seed)
            np.testing.assert_allclose(engine.run(samples), answers(samples), rtol=1e-5)
        assert (engine.batch, engine.window, engine.classes) == (1, 48_000, 3)
        assert engine.device == "Orin, tensorrt 10.3.0"
        assert engine.graph == "model_int8.onnx"
    finally:
        engine.close()
    assert machine.gpu.live == {}


def test_a_window_is_one_launch(machine):
    engine = machine.open()
    before = machine.gpu.calls.copy()
    engine.run(speech(1, 3))
    assert machine.gpu.calls - before == {
        "cudaGraphLaunch": 1, "cudaEventRecord": 1, "cudaEventSynchronize": 1,
    }  # fmt: skip
    copies = machine.gpu.calls["cudaMemcpyAsync"]
    assert copies == (0 if machine.gpu.integrated else 6)  # two warm-ups, and the captured one
    engine.close()


@given(rows=st.integers(1, 9), seconds=st.floats(0.4, 3.0), batch=st.sampled_from([1, 4]))
def test_any_number_of_any_length(rows, seconds, batch):
    with pytest.MonkeyPatch.context() as patch:
        runtime = FakeRuntime()
        patch.setattr(cuda.bindings, "runtime", runtime)
        trt = fake_tensorrt(runtime)
        plan = b'{"shapes": {"samples": [%d, 48000], "logits": [%d, 3]}}' % (batch, batch)
        engine = TensorrtEngine(plan, "g", trt=trt, cuda=Cuda(), log=build.make_log(trt))
        samples = speech(rows, seconds, rows)
        repeated = np.tile(samples, 8)[:, :48_000]
        np.testing.assert_allclose(engine.run(samples), answers(repeated), rtol=1e-5)
        engine.close()
        assert runtime.live == {}


def test_submitting_does_not_wait(machine):
    engine, samples = machine.open(batch=2), speech(2, 3)
    waits = machine.gpu.calls["cudaEventSynchronize"]
    engine.submit(samples)
    assert machine.gpu.calls["cudaEventSynchronize"] == waits
    looks = 0
    while not engine.finished():
        looks += 1
    assert looks >= 1
    samples[:] = 0  # the engine has its own copy
    first = engine.result()
    engine.submit(samples)
    second = engine.result()
    np.testing.assert_allclose(first, answers(speech(2, 3)), rtol=1e-5)  # not overwritten
    np.testing.assert_allclose(second, answers(samples))
    engine.close()


def test_the_order_of_calls_is_held(orin):
    engine = orin.open()
    with pytest.raises(EngineError, match=r"nothing was submitted; call submit"):
        engine.result()
    engine.submit(speech(1, 3))
    with pytest.raises(EngineError, match=r"result not fetched; call result\(\)"):
        engine.submit(speech(1, 3))
    engine.close()  # while it works
    assert orin.gpu.live == {}


@pytest.mark.parametrize("shape", [(2, 48_000), (1, 48_001), (1, 0), (0, 10)])
def test_a_shape_that_does_not_fit(orin, shape):
    engine = orin.open()
    with pytest.raises(EngineError, match=r"this engine allows up to \(1, 48000\): build one"):
        engine.submit(np.zeros(shape, np.float32))
    engine.close()


def test_precisions_are_graphs(orin):
    names = {"model_int8_fp16.onnx", "model_fp16.onnx"}
    with pytest.raises(BundleError, match=r"has no 'model_fp16.onnx'"):
        orin.open(precision="fp16")
    for name in names:
        (orin.bundle.path / name).write_bytes((orin.bundle.path / "model.onnx").read_bytes())
        orin.bundle.metadata.files[name] = orin.bundle.metadata.files["model.onnx"]
    found = {}
    for precision in ("int8", "fp16", "fp32"):
        engine = orin.open(precision=precision)
        found[precision] = engine.graph
        engine.close()
    assert found == {
        "int8": "model_int8_fp16.onnx", "fp16": "model_fp16.onnx", "fp32": "model.onnx",
    }  # fmt: skip
    with pytest.raises(BundleError, match=r"precision is 'bf16'; allowed: int8, fp16, fp32"):
        orin.open(precision="bf16")


# The cache


def test_what_was_built_is_found_again(orin, caplog):
    for _ in range(2):
        orin.open().close()
    assert orin.trt.builds == 1
    orin.open(batch=8).close()
    orin.open(window_s=1.0).close()
    assert orin.trt.builds == 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": "10.16.2"}, "is for tensorrt 'tensorrt 10.3.0', needed is 'tensorrt 10.16.2'"),
        ({"name": b"Thor"}, "is for gpu 'Orin', needed is 'Thor'"),
        ({"capability": (11, 0)}, "is for compute_capability '8.7', needed is '11.0'"),
    ],
)
def test_an_engine_of_another_machine_is_built_again(orin, caplog, change, line):
    orin.open().close()
    orin.renew(integrated=True, **change)
    orin.open().close()
    assert orin.trt.builds == 1
    assert line in caplog.text
    caplog.clear()
    orin.open().close()
    assert orin.trt.builds == 1
    assert not caplog.records


def test_of_two_at_once_one_builds(orin):
    with ThreadPool(2) as pool:
        slow = {"progress": lambda *_: time.sleep(0.2)}
        for engine in pool.map(lambda _: orin.open(**slow), range(2)):
            engine.close()
    assert orin.trt.builds == 1


def test_other_weights_of_the_same_graph_are_another_engine(orin):
    orin.open().close()
    graph, hashes = orin.bundle.gpu_graph()
    assert graph.name == "model_int8.onnx"
    files = orin.bundle.metadata.files
    assert hashes == [files["model_int8.onnx"].sha256, files["model_int8.bin"].sha256]


def test_timings_are_kept_and_stale_ones_are_not_used(orin, caplog):
    orin.open().close()
    orin.open(batch=2).close()
    assert orin.trt.timings == [b"", b"+"]
    orin.renew(version="10.16.2", integrated=True)
    orin.open().close()
    assert orin.trt.timings == [b""]
    assert sum("timing-8.7.cache" in line for line in caplog.messages) == 1


def test_a_plan_that_tensorrt_refuses(orin):
    (file,) = [orin.open().close(), *orin.folder.glob("cache/**/*.plan")][1:]
    header, _ = file.read_bytes().split(b"\n", 1)
    import hashlib
    import json

    fields = json.loads(header) | {"plan_sha256": hashlib.sha256(b"no plan").hexdigest()}
    file.write_bytes(json.dumps(fields).encode() + b"\nno plan")
    with pytest.raises(EngineError, match=r"cannot load the plan of model_int8.onnx: magic tag"):
        orin.open()
    assert orin.gpu.live == {}


def test_progress_is_of_the_outermost_phase(orin):
    seen = []
    orin.open(progress=lambda *step: seen.append(step)).close()
    assert seen == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]


def test_layers_tell_their_precision_and_cost(orin):
    engine = orin.open()
    layers = engine.layers()
    assert [(layer.precision, layer.reformat, layer.ms) for layer in layers] == [
        ("fp32", True, 0.25), ("int8", False, 0.25), ("fp16", False, 0.25), ("fp32", False, 0.25),
        ("other", False, 0),
    ]  # fmt: skip
    assert summary(layers) == (
        "layers: fp16 1 0.25 ms, fp32 1 0.25 ms, int8 1 0.25 ms, other 1 0.00 ms, "
        "reformats 1 0.25 ms"
    )
    engine.close()


# What fails


def test_no_driver_is_one_line():
    error, _ = real_runtime.cudaGetDeviceCount()
    if error == ERRORS.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        DeviceError, match=r"CUDA: \w+ in cudaGetDeviceCount: there is no (driver|GPU)"
    ):
        Cuda()


def test_missing_packages(orin, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependency, match=r"on a Jetson it comes with JetPack"):
        orin.open()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match=r'pip install "edge-ser\[tensorrt\]"'):
        Cuda()


def test_tensorrt_comes_before_that_for_rtx(orin):
    assert build.tensorrt_module() is orin.trt
    orin.patch.setitem(sys.modules, "tensorrt", None)
    assert build.tensorrt_module().__name__ == "tensorrt_rtx"


def test_a_tensorrt_that_lacks_a_library_says_which(tmp_path, monkeypatch):
    said = "libnvdla_compiler.so: cannot open shared object file"
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({said!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependency, match=f"cannot be imported .{said}.; in a container"):
        build.tensorrt_module()


def test_a_build_that_fails(orin):
    orin.trt.broken = True
    line = r"cannot build model_int8.onnx: no implementation within the memory$"
    with pytest.raises(EngineError, match=line):
        orin.open()
    assert orin.gpu.live == {}


@pytest.mark.parametrize("memory", [0, 100_000, 300_000])
def test_memory_that_is_full(monkeypatch, tmp_path, memory):
    machine = Machine(monkeypatch, tmp_path, memory=memory)
    with pytest.raises(
        EngineError, match=r"cudaErrorMemoryAllocation in .*: the GPU's memory is full"
    ):
        machine.open()
    assert machine.gpu.live == {}
    machine.renew()
    machine.open().close()


def test_a_context_that_does_not_run(orin):
    engine = orin.open()
    engine.close()
    orin.trt.broken = True  # what is built already is loaded
    with pytest.raises(EngineError, match=r"cannot run of model_int8.onnx: the context is broken$"):
        orin.open()
    assert orin.gpu.live == {}


@pytest.mark.parametrize("function", ["cudaGraphLaunch", "cudaEventRecord", "cudaEventSynchronize"])
def test_a_gpu_that_is_lost_in_mid_stream(orin, function):
    engine = orin.open()
    engine.run(speech(1, 3))
    orin.gpu.fail[function] = ERRORS.cudaErrorLaunchFailure
    with pytest.raises(
        EngineError,
        match=rf"cudaErrorLaunchFailure in {function}: the GPU is lost for this process",
    ):
        engine.run(speech(1, 3))
    del orin.gpu.fail[function]
    engine.close()


def test_closing_a_lost_gpu_is_an_error_of_ours(orin):
    engine = orin.open()
    orin.gpu.fail["everything"] = ERRORS.cudaErrorDevicesUnavailable
    with pytest.raises(EngineError, match=r"the GPU is lost"):
        engine.close()


# The fake is no invention


def test_its_cuda_is_that_of_the_package():
    names = [name for name in vars(FakeRuntime) if name.startswith("cuda")]
    functions = [name for name in names if inspect.isfunction(vars(FakeRuntime)[name])]
    assert len(functions) >= 20
    for name in functions:
        fake = list(inspect.signature(vars(FakeRuntime)[name]).parameters)[1:]
        assert fake == list(inspect.signature(getattr(real_runtime, name)).parameters), name


def real_parameters(function):
    """Return the parameters that the text of a binding names: those without a value, and all."""
    text = re.search(rf"{function.__name__}\(self: .*?\) -> ", function.__doc__, re.S).group()
    found = re.findall(r"(?<=, )(\w+): ([^,]*)", text)
    return [name for name, kind in found if " = " not in kind], [name for name, _ in found]


def test_its_tensorrt_is_that_of_the_package():
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this machine")
    checked = 0
    for name, fake in fake_tensorrt(None).parts.items():
        real = getattr(rtx, name)
        for part, value in vars(fake).items():
            if inspect.isfunction(value) and not part.startswith("_"):
                parameters = list(inspect.signature(value).parameters)[1:]
                needed, known = real_parameters(getattr(real, part))
                assert needed == parameters[: len(needed)], (name, part)
                assert parameters == known[: len(parameters)], (name, part)
                checked += 1
            elif not part.startswith("_"):
                assert hasattr(real, part), (name, part)
        for part in {"num_io_tensors"} & vars(fake).keys():
            assert hasattr(real, part)
    assert checked >= 15


WHEELS = (
    "tensorrt-cu12-bindings==10.3.0",  # JetPack 6
    "tensorrt-cu13-bindings==10.16.1.11",  # JetPack 7
    "tensorrt-cu13-bindings==11.4.0.106",
)


@pytest.mark.parametrize("wheel", WHEELS)
def test_it_has_no_name_that_tensorrt_lacks(wheel, tmp_path):
    """They cannot be imported without NVIDIA's libraries, but their names can be read."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version=3.12", "--platform=manylinux_2_28_x86_64",
         "--platform=manylinux_2_17_x86_64", "-d", str(tmp_path), wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{wheel} cannot be downloaded: {done.stderr.splitlines()[-1]}")
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as content:
        (library,) = (n for n in content.namelist() if n.endswith("tensorrt.so"))
        binding = content.read(library)
    parts = fake_tensorrt(None).parts
    names = {part for fake in parts.values() for part in vars(fake) if not part.startswith("_")}
    names |= {"num_io_tensors", "STRONGLY_TYPED", "IProgressMonitor", "phase_start", "DETAILED"}
    names |= {"report_layer_time", "IProfiler", "LayerInformationFormat", "JSON"}
    names |= {"step_complete", "phase_finish", "ILogger", "INTERNAL_ERROR", *parts}
    names -= {"contexts", "shapes", "log"}
    lacking = {name for name in names if name.encode() + b"\0" not in binding}
    assert lacking == set()
