"""What `edge-ser build` asks of TensorRT, asked of a real one: that for RTX needs no GPU."""

import re

import pytest

from edge_ser.bundle import MODELS, Bundle
from edge_ser.engines.build import build_plan, make_log
from edge_ser.errors import BundleError, EngineError
from edge_ser.testing import make_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this machine")


def for_a_gpu_that_is_not_here(config):
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)


def build(graph, batch=1, samples=16_000, **how):
    how = {"configure": for_a_gpu_that_is_not_here, "log": make_log(trt), **how}
    return build_plan(trt, graph, batch, samples, **how)


@pytest.mark.parametrize("name", ["default", "tiny"])
@pytest.mark.parametrize("batch", [1, 8])
def test_shipped_graphs_are_built(name, batch):
    graph, _ = Bundle.open(name).gpu_graph()
    weights = (MODELS / name / "model_int8.bin").stat().st_size
    steps = []
    plan, timings = build(graph, batch, progress=lambda *step: steps.append(step))
    assert len(plan) > weights
    assert steps[0][1] == 0 and steps[-1][1] == steps[-1][2] > 0
    assert timings == b""  # that for RTX has none


def test_shapes_are_fixed_and_only_logits_come_out(tmp_path):
    """As the log lists them; to ask the plan itself takes a GPU."""
    log, lines = make_log(trt), []
    type(log).log = lambda self, severity, text: lines.append(text)
    build(make_bundle(tmp_path / "b") / "model_int8.onnx", 2, 9000, log=log)
    pattern = r"Name: (\w+), IOMode: (\w+), DataType: (\w+), Dimensions: (\S+),"
    assert set(re.findall(pattern, "\n".join(lines))) == {
        ("samples", "Input", "Float", "[2,9000]"),
        ("logits", "Output", "Float", "[2,3]"),
    }


def test_a_graph_that_it_does_not_take():
    graph = MODELS / "tiny" / "model_int8_x86.onnx"
    with pytest.raises(
        BundleError, match=r"does not take .*_x86.onnx'.* zero point is not supported"
    ):
        build(graph)


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"does not take '.*model.onnx'"):
        build(tmp_path / "model.onnx")


def test_a_gpu_that_it_does_not_know(tmp_path):
    def old(config):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM75, 0)

    with pytest.raises(EngineError, match=r"cannot build model_int8.onnx: .*not supported"):
        build(make_bundle(tmp_path / "b") / "model_int8.onnx", configure=old)
