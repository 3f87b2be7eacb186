import stat

import onnxruntime
import pytest

from edge_ser.bundle import MODELS
from edge_ser.engines import providers as placing
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.engines.providers import PROVIDERS, providers, require_placement, watch_placement
from edge_ser.errors import DeviceError
from edge_ser.testing import make_bundle

ALL = [name for names in PROVIDERS.values() for name in names]
AZURE = "AzureExecutionProvider"
"""It is in the package for processors, and takes no node of ours: all go back."""


def test_every_name_is_one_of_onnx_runtimes():
    known = onnxruntime.capi.onnxruntime_pybind11_state.get_all_providers()
    assert {*ALL} <= {*known}


def test_the_provider_of_tensorrt_keeps_what_it_builds_where_nobody_else_writes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (name, options), other = providers("tensorrt", ALL, precision="int8")
    assert (name, other) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    folder = tmp_path / "edge_ser" / "engines"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("precision", "int8", "fp16"),
    [("fp32", False, False), ("fp16", False, True), ("int8", True, True)],
)
def test_the_provider_of_tensorrt_may_do_what_the_graph_says(
    precision, int8, fp16, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (_, options), _ = providers("tensorrt", ALL, precision=precision)
    assert (options["trt_int8_enable"], options["trt_fp16_enable"]) == (int8, fp16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_others_have_no_options(device):
    assert providers(device, ALL) == [*PROVIDERS[device]]


@pytest.mark.skipif(AZURE not in onnxruntime.get_available_providers(), reason=f"no {AZURE}")
@pytest.mark.parametrize("name", ["default", "tiny"])
def test_layers_that_go_back_to_the_processor_are_an_error(name, monkeypatch):
    """With a real provider that takes nothing, in the place of CUDA's."""
    monkeypatch.setitem(PROVIDERS, "cuda", (AZURE,))
    with pytest.raises(DeviceError) as error:
        OnnxEngine(MODELS / name / "model_int8.onnx", device="cuda")
    line = str(error.value)
    assert line.startswith("ONNX Runtime sends ") and "from device 'cuda' to the processor" in line
    count = int(line.split()[3])
    assert count > 30


@pytest.mark.skipif(AZURE not in onnxruntime.get_available_providers(), reason=f"no {AZURE}")
def test_an_onnx_runtime_that_notes_nothing_refuses_by_itself(tmp_path):
    graph = make_bundle(tmp_path / "b", fp32=True) / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    watch_placement(options, object)  # a session type without the notes
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        onnxruntime.InferenceSession(str(graph), options, providers=[AZURE], enable_fallback=0)
    require_placement(object(), "cuda")  # has nothing to read


def test_what_is_of_shapes_may_run_on_the_processor(tmp_path):
    """A session of a GPU whose layers are all on it: the processor's own, named as a GPU."""
    import numpy as np
    from onnx import TensorProto, helper, save

    nodes = [
        helper.make_node("Shape", ["samples"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["logits"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("samples", TensorProto.FLOAT, ["N", "T"])],
        [value("logits", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    watch_placement(options, onnxruntime.InferenceSession)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), options, providers=[placing.PROVIDERS["cpu"][0]]
    )
    require_placement(session, "cuda")
    np.testing.assert_array_equal(
        session.run(None, {"samples": np.zeros((1, 3), np.float32)})[0], [1, 3]
    )
