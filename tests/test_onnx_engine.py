import logging
import platform
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_ser import BundleError, DeviceError, EngineError, MissingDependency
from edge_ser.bundle import Bundle
from edge_ser.engines import has_vnni, open_onnx
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.selftest import deviation
from edge_ser.testing import FakeEngine, expected_logits, list_files, make_bundle
from tests.test_bundle import edit

SAMPLES = np.random.default_rng(0).normal(0, 0.3, (2, 6400)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return make_bundle(tmp_path / "b", fp32=True)


def change_graph(folder, change, name="model.onnx"):
    """Change a graph, and list it as it is then."""
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    edit(folder, files=list_files(folder, set()))


# Running


@pytest.mark.parametrize("name", ["model_int8.onnx", "model_int8_x86.onnx", "model.onnx"])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_logits_are_those_worked_out_by_hand(folder, name, threads):
    engine = OnnxEngine(folder / name, threads=threads)
    logits = engine.run(SAMPLES)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 3))
    expected = [expected_logits(samples, 3) for samples in SAMPLES]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert (engine.device, engine.graph, engine.classes) == ("cpu", name, 3)


def test_a_failed_run_is_an_engine_error_of_one_line(folder):
    engine = OnnxEngine(folder / "model.onnx")
    with pytest.raises(
        EngineError, match=r"\Amodel\.onnx failed on cpu: .*Invalid rank for input: samples.*\Z"
    ):
        engine.run(SAMPLES[0])


def test_waiting_threads_do_not_spin(folder):
    options = OnnxEngine(folder / "model.onnx", threads=2)._session.get_session_options()
    assert options.intra_op_num_threads == 2
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"


def test_a_closed_engine_has_let_its_session_go(folder):
    engine = OnnxEngine(folder / "model.onnx")
    engine.close()
    assert not hasattr(engine, "_session")


# Opening


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_one_or_more(folder, threads):
    with pytest.raises(EngineError) as error:
        OnnxEngine(folder / "model.onnx", threads=threads)
    line = f"threads is {threads!r}; allowed: 1 or more, or None for one per core"
    assert str(error.value) == line


def test_without_onnxruntime_the_line_holds_the_pip_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as error:
        OnnxEngine(folder / "model.onnx")
    assert str(error.value) == 'onnxruntime is not installed; run: pip install "edge-ser[cpu]"'


def test_an_unknown_device(folder):
    with pytest.raises(DeviceError) as error:
        OnnxEngine(folder / "model.onnx", device="npu")
    assert str(error.value) == "device is 'npu'; allowed: cpu, cuda, tensorrt"


def test_cuda_without_its_provider_names_those_there_are(folder):
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in available:
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(DeviceError) as error:
        open_onnx(Bundle.open(folder), precision="fp32", device="cuda")
    assert str(error.value) == (
        "device 'cuda' needs CUDAExecutionProvider, this ONNX Runtime has "
        f'{", ".join(available)}; use cpu, or pip install "edge-ser[gpu]"'
    )


def test_int8_on_cuda_is_refused(folder):
    with pytest.raises(DeviceError) as error:
        open_onnx(Bundle.open(folder), device="cuda")
    assert str(error.value) == (
        "precision 'int8' on device 'cuda': ONNX Runtime would send it back to the CPU; "
        "use fp16 or fp32 on cuda, or int8 on cpu or tensorrt"
    )


def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    path = str(tmp_path / "junk.onnx")
    with pytest.raises(BundleError) as error:
        OnnxEngine(tmp_path / "junk.onnx")
    assert str(error.value).startswith(f"{path!r} cannot be opened: [ONNXRuntimeError]")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_refused_in_one_line(folder):
    (folder / "model_int8.bin").unlink()
    with pytest.raises(BundleError) as error:
        OnnxEngine(folder / "model_int8.onnx")
    path = str(folder / "model_int8.onnx")
    assert str(error.value).startswith(f"{path!r} cannot be opened: [ONNXRuntimeError]")
    assert "\n" not in str(error.value)


# Graphs with other shapes


def set_dim(value, axis, size):
    dim = value.type.tensor_type.shape.dim[axis]
    if isinstance(size, int):
        dim.dim_value = size
    else:
        dim.dim_param = size


def rename_input(model):
    model.graph.input[0].name = model.graph.node[0].input[0] = "audio"


def add_input(model):
    model.graph.input.append(helper.make_tensor_value_info("gain2", TensorProto.FLOAT, [1]))


def no_embedding(model):
    del model.graph.output[1]


def rename_logits(model):
    model.graph.output[0].name = model.graph.node[2].output[0] = "scores"


def flat_logits(model):
    size = numpy_helper.from_array(np.array([-1]), "size")
    model.graph.node[2].output[0] = "matrix"
    node = helper.make_node("Reshape", ["matrix", "size"], ["logits"])
    model.graph.node.append(node)
    model.graph.initializer.append(size)
    value = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["M"])
    model.graph.output[0].CopyFrom(value)


def open_classes(model):
    model.graph.node[2].output[0] = "all"
    model.graph.node.append(helper.make_node("Compress", ["all", "keep"], ["logits"], axis=1))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, bool), "keep"))
    set_dim(model.graph.output[0], 1, "C")


INPUT = "allowed: one input, 'samples' tensor(float) ['N', 'T'], both of any size"
OUTPUT = "allowed: 'logits' tensor(float) ['N', classes], 'embedding' tensor(float) ['N', D]"
SHAPES = [
    (rename_input, f"'audio' tensor(float) ['N', 'T']; {INPUT}"),
    (
        lambda model: set_dim(model.graph.input[0], 1, 48_000),
        f"'samples' tensor(float) ['N', 48000]; {INPUT}",
    ),
    (
        lambda model: set_dim(model.graph.input[0], 0, 1),
        f"'samples' tensor(float) [1, 'T']; {INPUT}",
    ),
    (add_input, f"'samples' tensor(float) ['N', 'T'], 'gain2' tensor(float) [1]; {INPUT}"),
    (
        open_classes,
        f"'logits' tensor(float) ['N', 'C'], 'embedding' tensor(float) ['N', 1]; {OUTPUT}",
    ),
    (no_embedding, f"'logits' tensor(float) ['N', 3]; {OUTPUT}"),
    (
        rename_logits,
        f"'scores' tensor(float) ['N', 3], 'embedding' tensor(float) ['N', 1]; {OUTPUT}",
    ),
    (flat_logits, f"'logits' tensor(float) ['M'], 'embedding' tensor(float) ['N', 1]; {OUTPUT}"),
]


@pytest.mark.parametrize(("change", "line"), SHAPES, ids=[line for _, line in SHAPES])
def test_a_graph_with_other_inputs_or_outputs(folder, change, line):
    change_graph(folder, change)
    with pytest.raises(BundleError) as error:
        open_onnx(Bundle.open(folder), precision="fp32")
    assert str(error.value) == f"'{folder / 'model.onnx'}' has {line}"


def test_a_graph_with_another_number_of_classes(folder):
    edit(folder, labels=["calm", "loud"])
    with pytest.raises(BundleError) as error:
        open_onnx(Bundle.open(folder), precision="fp32")
    assert str(error.value) == f"'{folder / 'model.onnx'}' has 3 logits for 2 labels"


def set_property(model, key, value):
    (entry,) = [entry for entry in model.metadata_props if entry.key == key]
    entry.value = value


PROPERTIES = [
    ("sample_rate_hz", "8000", "says sample_rate_hz is '8000', metadata.json 16000"),
    ("sample_rate_hz", "fast", "says sample_rate_hz is 'fast', metadata.json 16000"),
    ("schema_version", "2", "says schema_version is '2', metadata.json 1"),
    (
        "labels",
        '["loud", "lively", "calm"]',
        """says labels is '["loud", "lively", "calm"]', metadata.json ['calm', 'lively', 'loud']""",
    ),
]


@pytest.mark.parametrize(("key", "value", "line"), PROPERTIES)
def test_a_graph_that_contradicts_the_metadata(folder, key, value, line):
    change_graph(folder, lambda model: set_property(model, key, value))
    with pytest.raises(BundleError) as error:
        open_onnx(Bundle.open(folder), precision="fp32")
    assert str(error.value) == f"'{folder / 'model.onnx'}' {line}"


def test_a_graph_without_properties(folder):
    change_graph(folder, lambda model: model.ClearField("metadata_props"))
    with pytest.raises(BundleError) as error:
        open_onnx(Bundle.open(folder), precision="fp32")
    assert str(error.value) == (
        f"'{folder / 'model.onnx'}' says labels is None, metadata.json ['calm', 'lively', 'loud']"
    )


# x86 without VNNI


@pytest.fixture
def x86(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def shift_logits(model):
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "bias"]
    bias.CopyFrom(numpy_helper.from_array(np.array([3, -1, -4], np.float32), "bias"))


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("vnni", [True, False])
def test_a_processor_that_passes_the_self_test_runs_the_x86_graph(folder, vnni):
    engine = open_onnx(Bundle.open(folder), vnni=vnni)
    assert engine.graph == "model_int8_x86.onnx"


@pytest.mark.usefixtures("x86")
def test_with_vnni_the_self_test_is_not_asked(folder):
    change_graph(folder, shift_logits, "model_int8_x86.onnx")
    assert open_onnx(Bundle.open(folder), vnni=True).graph == "model_int8_x86.onnx"


@pytest.mark.usefixtures("x86")
def test_without_vnni_a_failed_self_test_means_float_and_is_said(folder, caplog):
    change_graph(folder, shift_logits, "model_int8_x86.onnx")
    engine = open_onnx(Bundle.open(folder), threads=1, vnni=False)
    assert engine.graph == "model_int8.onnx (float)"
    assert caplog.record_tuples == [
        (
            "edge_ser",
            logging.WARNING,
            "no VNNI, and the self-test of model_int8_x86.onnx is off by 0.75 (allowed: 0.05): "
            "model_int8.onnx runs in float, more slowly",
        )
    ]
    options = engine._session.get_session_options()
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert options.intra_op_num_threads == 1
    np.testing.assert_allclose(engine.run(SAMPLES)[0], expected_logits(SAMPLES[0], 3), atol=1e-5)


@pytest.mark.usefixtures("x86")
def test_without_vnni_a_self_test_that_fails_in_float_too_is_an_error(folder):
    change_graph(folder, shift_logits, "model_int8_x86.onnx")
    change_graph(folder, shift_logits, "model_int8.onnx")
    with pytest.raises(EngineError) as error:
        open_onnx(Bundle.open(folder), vnni=False)
    line = f"bundle '{folder}' fails its self-test on this processor; use fp32"
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx512_vnni avx2\n", True),
        ("flags\t\t: fpu avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512bw\n", False),
    ],
)
def test_vnni_is_read_from_cpuinfo(tmp_path, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_vnni(tmp_path / "cpuinfo") is expected


def test_a_processor_that_does_not_tell_counts_as_one_without_vnni(tmp_path):
    assert not has_vnni(tmp_path / "cpuinfo")


def quantized_graph():
    """samples (N, T) -> Q/DQ -> MatMul with an int8 weight -> Q/DQ -> logits; T must be 8."""
    constants = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "weight": np.arange(-12, 12, dtype=np.int8).reshape(8, 3),
        "logit_scale": np.float32(0.5),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["samples", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "logit_scale", "zero"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "logit_scale", "zero"], ["logits"]),
        helper.make_node("Identity", ["samples"], ["embedding"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantized",
        [value("samples", TensorProto.FLOAT, ["N", "T"])],
        [
            value("logits", TensorProto.FLOAT, ["N", 3]),
            value("embedding", TensorProto.FLOAT, ["N", 8]),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("disabled", "kernel"), [("0", "QLinearMatMul"), ("1", "MatMul")])
def test_the_option_behind_float_arithmetic_replaces_the_int8_kernels(tmp_path, disabled, kernel):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.disable_quant_qdq", disabled)
    model = quantized_graph().SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kernels = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert kernels & {"QLinearMatMul", "MatMul"} == {kernel}


def test_float_arithmetic_rounds_as_the_int8_kernels_do(tmp_path):
    onnx.save(quantized_graph(), tmp_path / "q.onnx")
    samples = np.random.default_rng(0).uniform(-3, 3, (50, 8)).astype(np.float32)
    int8, floats = (
        OnnxEngine(tmp_path / "q.onnx", float_arithmetic=floats).run(samples)
        for floats in (False, True)
    )
    np.testing.assert_array_equal(int8, floats)
    assert np.abs(floats).max() > 1


def test_a_layer_with_int8_weights_alone_does_not_round_what_it_reads(tmp_path):
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-127, 128, (256, 32), np.int8), rng.uniform(0.01, 0.02, 32)
    constants = {"weight": weight, "scale": scale.astype(np.float32), "zero": np.zeros(32, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["wide"], axis=1),
        helper.make_node("MatMul", ["samples", "wide"], ["logits"]),
        helper.make_node("Identity", ["samples"], ["embedding"]),
    ]
    shapes = {"samples": ["N", "T"], "logits": ["N", 32], "embedding": ["N", 256]}
    inputs, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    arrays = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "weights", [inputs], outputs, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "w.onnx")
    samples = rng.normal(size=(50, 256)).astype(np.float32)
    found = OnnxEngine(tmp_path / "w.onnx").run(samples)
    expected = samples.astype(float) @ (weight * scale)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


# The self-test


def test_deviation_is_a_part_of_the_largest_recorded_logit(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path))
    recorded = [expected_logits(np.full(1, amplitude), 3) for amplitude in (0.05, 0.5)]
    engine = FakeEngine(recorded[0], recorded[1] + np.array([0, 0.5, 0]))
    engine.graph = "model_int8.onnx (float)"
    assert deviation(bundle, engine) == pytest.approx(0.5 / 4)
    assert [call.shape for call in engine.calls] == [(1, 8000), (1, 16000)]


def test_logits_that_are_not_numbers_deviate_without_bound(tmp_path):
    engine = FakeEngine([0.0, np.nan, 0.0])
    engine.graph = "model_int8.onnx"
    assert deviation(Bundle.open(make_bundle(tmp_path)), engine) == float("inf")


@pytest.mark.parametrize("content", [b"", b"junk", "other", "pickle", "shape"])
def test_a_bundle_without_a_self_test_for_the_graph(tmp_path, content):
    folder = make_bundle(tmp_path)
    if content == "other":
        np.savez(folder / "selftest.npz", samples_0=SAMPLES[0])
    elif content == "shape":
        np.savez(folder / "selftest.npz", samples_0=SAMPLES[0], model_int8_0=np.zeros(2))
    elif content == "pickle":
        objects = np.array([{}], dtype=object)
        np.savez(folder / "selftest.npz", samples_0=objects, model_int8_0=objects)
    else:
        (folder / "selftest.npz").write_bytes(content)
    edit(folder, files=list_files(folder, set()))
    engine = OnnxEngine(folder / "model_int8.onnx")
    with pytest.raises(BundleError) as error:
        deviation(Bundle.open(folder), engine)
    line = f"'{folder / 'selftest.npz'}' has no self-test for model_int8.onnx"
    assert str(error.value) == line
