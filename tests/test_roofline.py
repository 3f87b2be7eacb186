import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import PEAKS, Peak, Work, peak_of, work_of
from edge_ser.errors import EdgeSerError
from edge_ser.testing import make_bundle
from export.encoders.wav import WavEncoder
from export.graph import export_graph
from export.half import half
from export.quantize import quantize, write_int8
from tests.speech_corpus import voice

FLOAT = TensorProto.FLOAT


# by hand


def model(nodes, constants):
    inputs = [helper.make_tensor_value_info("samples", FLOAT, ["N", "T"])]
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["N", 7])]
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def by_hand(tmp_path):
    """Two convolutions, the second in INT8 and two groups, a product in half, and a layer.

    Of the layer only the weights are INT8: it multiplies float32.
    """
    make = helper.make_node
    nodes = [
        make("Unsqueeze", ["samples", "one"], ["x"]),  # (1, 1, 101)
        make("Conv", ["x", "w1", "b1"], ["c1"], strides=[2]),  # (1, 4, 49)
        make("QuantizeLinear", ["c1", "s", "z"], ["q1"]),
        make("DequantizeLinear", ["q1", "s", "z"], ["d1"]),
        make("DequantizeLinear", ["w2", "s", "z"], ["dw2"]),
        make("Conv", ["d1", "dw2"], ["c2"], group=2),  # (1, 6, 47)
        make("Transpose", ["c2"], ["t"], perm=[0, 2, 1]),  # (1, 47, 6)
        make("Cast", ["t"], ["h"], to=TensorProto.FLOAT16),
        make("MatMul", ["h", "w3"], ["m"]),  # (1, 47, 5)
        make("Cast", ["m"], ["f"], to=FLOAT),
        make("ReduceMean", ["f", "one"], ["r"], keepdims=0),  # (1, 5)
        make("DequantizeLinear", ["w4", "s", "z"], ["dw4"]),
        make("Gemm", ["r", "dw4", "b4"], ["logits"], transB=1),  # (1, 7)
    ]
    constants = {
        "one": np.array([1], np.int64), "s": np.float32(0.1), "z": np.int8(0),
        "w1": ones(4, 1, 5), "b1": ones(4), "w2": ones(6, 2, 3, dtype=np.int8),
        "w3": ones(6, 5, dtype=np.float16), "w4": ones(7, 5, dtype=np.int8), "b4": ones(7),
    }  # fmt: skip
    onnx.save(model(nodes, constants), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_multiplications_are_those_counted_by_hand(tmp_path):
    work = work_of(by_hand(tmp_path), 101)
    assert work.macs == {
        "fp32": 4 * 49 * 5 + 7 * 5,
        "int8": 6 * 47 * (2 * 3),
        "fp16": 47 * 5 * 6,
    }
    assert work.weight_bytes == (8 + 4 + 1) + 4 * (20 + 4) + 36 + 2 * 30 + 35 + 4 * 7


def test_a_transposed_factor_is_no_other_work(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["samples"], ["t"]),  # (9, 1)
        helper.make_node("Gemm", ["t", "w"], ["logits"], transA=1),  # (1, 9) times (9, 7)
    ]
    onnx.save(model(nodes, {"w": ones(9, 7)}), tmp_path / "g.onnx")
    assert work_of(tmp_path / "g.onnx", 9).macs["fp32"] == 63


def test_weights_in_another_file_count(tmp_path):
    folder = make_bundle(tmp_path / "b", fp32=True)
    inside, outside = (work_of(folder / f"{name}.onnx", 8000) for name in ("model", "model_int8"))
    assert inside == outside == Work({"int8": 0, "fp16": 0, "fp32": 3}, 24)


# against torch


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = WavEncoder(32, 1)
        self.classify = nn.Linear(self.encoder.dim, 3)

    def forward(self, samples):
        embedding = self.encoder(samples)[:, -1].mean(dim=1)
        return self.classify(embedding), embedding


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small network of convolutions and attention, and its graphs in all precisions."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    network = Mean().eval()
    export_graph(network, {}, 16_000, folder / "model.onnx")
    windows = [voice(900.0 * (n + 1), 130.0, 0.5, n) for n in range(2)]
    _, int8, _ = quantize(onnx.load(folder / "model.onnx"), windows)
    write_int8(int8, folder)
    onnx.save(half(folder / "model.onnx", windows), folder / "model_fp16.onnx")
    onnx.save(half(folder / "model_int8.onnx", windows), folder / "model_int8_fp16.onnx")
    return network, folder


@pytest.mark.parametrize("samples", [8000, 16_000])
def test_multiplications_are_those_that_torch_counts(exported, samples):
    network, folder = exported
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, samples))
    counted = counter.get_total_flops() // 2  # it counts additions as well
    assert work_of(folder / "model.onnx", samples).macs == {"int8": 0, "fp16": 0, "fp32": counted}
    for name in ("model_fp16", "model_int8", "model_int8_fp16"):
        assert sum(work_of(folder / f"{name}.onnx", samples).macs.values()) == counted


def test_each_precision_has_its_layers(exported):
    _, folder = exported
    fp32, fp16, int8, both = (
        work_of(folder / f"{name}.onnx", 16_000)
        for name in ("model", "model_fp16", "model_int8", "model_int8_fp16")
    )
    assert fp16.macs["fp16"] > 0.5 * fp32.macs["fp32"]
    assert fp16.macs["fp32"] > 0  # the first convolution
    assert int8.macs["int8"] == both.macs["int8"] > 0.5 * fp32.macs["fp32"]
    assert int8.macs["fp16"] == 0 < both.macs["fp16"]
    assert 0.45 < fp16.weight_bytes / fp32.weight_bytes < 0.6
    assert 0.24 < int8.weight_bytes / fp32.weight_bytes < 0.4


# the floor


def test_the_floor_is_that_of_the_anchors():
    """Wav2Vec2-base on an Orin Nano of 20 dense TOPS and 68 GB/s, as worked out by hand before."""
    nano = Peak(20, 10, 5, 68, "")
    second, three = (
        Work({"int8": int(gmac * 1e9), "fp16": 0, "fp32": 0}, 95_000_000) for gmac in (6.9, 21.2)
    )
    assert second.floor_ms(nano, 1) == pytest.approx(1.40, abs=0.005)  # its weights
    assert three.floor_ms(nano, 1) == pytest.approx(2.12, abs=0.005)  # its multiplications


def test_precisions_add_up_and_weights_are_read_once():
    peak = Peak(int8=8, fp16=4, fp32=2, gb_s=100, source="")
    work = Work({"int8": 4_000_000_000, "fp16": 2_000_000_000, "fp32": 1_000_000_000}, 500_000_000)
    assert work.floor_ms(peak, 1) == pytest.approx(5)  # of 3 and 5
    assert work.floor_ms(peak, 32) == pytest.approx(96)  # of 96 and 5


@given(st.sampled_from(list(PEAKS)), st.integers(1, 64), st.integers(1, 10**12))
def test_less_precision_is_no_slower(name, batch, macs):
    none = dict.fromkeys(("int8", "fp16", "fp32"), 0)
    floors = [
        Work({**none, precision: macs}, size).floor_ms(PEAKS[name], batch)
        for precision, size in (("int8", 1), ("fp16", 2), ("fp32", 4))
    ]
    assert floors == sorted(floors)


def test_a_gpu_is_known_by_its_name_and_an_orin_by_its_board():
    assert peak_of("NVIDIA L4", "AMD EPYC").gb_s == 300
    boards = {
        "NVIDIA Jetson AGX Orin Developer Kit": 204.8,
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit": 102.4,
        "NVIDIA Jetson Orin Nano Developer Kit Super": 102,
    }
    assert {board: peak_of("Orin", board).gb_s for board in boards} == boards
    assert all(peak.source for peak in PEAKS.values())


@pytest.mark.parametrize("gpu", [("GeForce 8800", "Orin Nano"), ("Orin", "a board of my own")])
def test_a_gpu_that_is_not_known(gpu):
    with pytest.raises(EdgeSerError, match=rf"peaks of '{gpu[0]}' \({gpu[1]}\) are not known"):
        peak_of(*gpu)


def test_what_is_no_graph_is_one_line(tmp_path):
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(EdgeSerError, match=r"model.onnx' cannot be counted \(.+\)$"):
        work_of(tmp_path / "model.onnx", 16_000)
