"""`python -m benchmarks gpu`: on a machine without a GPU, and on one that is played."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from cuda.bindings import runtime as cuda_runtime
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.cells import PROBES, Cell, Filled, expected_of, measure_cell
from benchmarks.machine import ROOT
from benchmarks.networks import model_of
from benchmarks.runtimes import RUNTIMES, halve, open_torch
from benchmarks.subjects import synthetic_speech
from edge_ser.bundle import sha256
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.errors import BundleError, DeviceError, EdgeSerError, EngineError
from edge_ser.testing import FakeEngine, make_bundle
from export.probe import engine_of
from tests.test_wav2vec2 import SIZES

HERE = cuda_runtime.cudaGetDeviceCount()[0] == cuda_runtime.cudaError_t.cudaSuccess
without_gpu = pytest.mark.skipif(HERE, reason="this machine has a GPU")


# what is measured


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def checkpoint(home):
    folder = home / "checkpoint"
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SIZES | {"num_hidden_layers": 1}, classifier_proj_size=16, num_labels=3
    )
    model = Wav2Vec2ForSequenceClassification(config)
    with torch.no_grad():  # of a new network all norms are 1 and biases 0
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(home):
    return make_bundle(home / "bundle", fp32=True)


@pytest.fixture(scope="module")
def small(home, checkpoint):
    """The checkpoint in all precisions."""
    (home / "out").mkdir()
    return model_of("small", checkpoint, home / "out", None)


def test_a_checkpoint_becomes_graphs_of_the_same_answers(small, home):
    names = {precision: graph.file.name for precision, graph in small.graphs.items()}
    assert names == {
        "int8": "model_int8_fp16.onnx", "fp16": "model_fp16.onnx", "fp32": "model.onnx",
    }  # fmt: skip
    assert small.graphs["fp32"].weights.metadata is None
    windows = np.stack(synthetic_speech(2, 0.5, seed=3))
    fp32 = OnnxEngine(small.graphs["fp32"].file).run(windows)
    with torch.inference_mode():
        logits, _ = small.network.load()(torch.from_numpy(windows))
    np.testing.assert_allclose(logits, fp32, atol=1e-4)
    int8 = engine_of(small.graphs["int8"].file.with_name("model_int8.onnx")).run(windows)
    assert 1e-4 < np.abs(int8 - fp32).max() / np.abs(fp32).max() < 0.2


def test_graphs_are_made_once(small, checkpoint, home, capsys):
    again = model_of("small", checkpoint, home / "out", None)
    assert "nothing changed" in capsys.readouterr().err
    assert {p: graph.sha256 for p, graph in again.graphs.items()} == {
        p: graph.sha256 for p, graph in small.graphs.items()
    }


def test_a_bundle_brings_its_graphs_and_says_what_it_lacks(bundle, tmp_path):
    model = model_of("own", bundle, tmp_path, None)
    assert model.graphs["fp16"] == f"{bundle} has no model_fp16.onnx"
    assert model.graphs["int8"].file == bundle / "model_int8.onnx"
    assert model.graphs["int8"].weights.reference == bundle / "model.onnx"
    assert model.graphs["int8"].weights.metadata.labels == ("calm", "lively", "loud")
    assert model.network.startswith("torch needs the folder of a run of a recipe")
    without = make_bundle(tmp_path / "int8")
    assert model_of("own", without, tmp_path, None).graphs["int8"].weights.reference == (
        without / "model_int8.onnx"
    )
    (bundle / "metadata.json").rename(tmp_path / "kept")
    bare = model_of("own", bundle, tmp_path, None)
    (tmp_path / "kept").rename(bundle / "metadata.json")
    assert bare.graphs["int8"].weights.metadata is None


def test_a_run_needs_the_pretrained_encoder_for_torch(tmp_path):
    make_bundle(tmp_path / "run" / "bundle", fp32=True)
    (tmp_path / "run" / "train").mkdir()
    (tmp_path / "run" / "train" / "model.safetensors").write_bytes(b"weights")
    model = model_of("default", tmp_path / "run", tmp_path, None)
    assert model.graphs["fp32"].file == tmp_path / "run" / "bundle" / "model.onnx"
    assert model.network == "torch needs --weights, the pretrained encoder"
    model = model_of("default", tmp_path / "run", tmp_path, tmp_path)
    assert model.network.sha256 == sha256(tmp_path / "run" / "train" / "model.safetensors")
    with pytest.raises(EdgeSerError, match=r"has no whisper-base-encoder$"):
        model.network.load()


def test_a_folder_with_nothing_in_it(tmp_path):
    with pytest.raises(BundleError, match=r"holds none of model.onnx, model_int8.onnx"):
        model_of("default", tmp_path, tmp_path, None)


RECIPE = """
name = "tiny"
data = { corpora = ["a"], labels = ["calm", "lively", "loud"] }
windows = { window_s = 3.0, hop_s = 1.0 }
encoder = { family = "whisper", source = "whisper-base-encoder", layers = 1, states = 2 }
train = { epochs = 1 }
"""


@pytest.fixture(scope="module")
def whisper(home):
    """A recipe of a name that is embedded, with one layer of Whisper-base."""
    (home / "recipes").mkdir()
    (home / "recipes" / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "RECIPES", home / "recipes")
        return model_of("tiny", None, home / "whisper", None)


def test_without_a_folder_weights_are_random_and_the_embedded_int8_is_trained(whisper):
    sources = {p: graph.weights.source for p, graph in whisper.graphs.items()}
    assert sources == {
        "int8": "the embedded model", "fp16": "random weights", "fp32": "random weights",
    }  # fmt: skip
    int8 = whisper.graphs["int8"]
    assert int8.weights.metadata.name == "tiny"
    window = synthetic_speech(1, 1.0, seed=3)[0][None]
    expected = engine_of(int8.weights.reference).run(window)
    # Fused, convolutions between Q/DQ with half scales are wrong in ONNX Runtime 1.32.
    found = OnnxEngine(int8.file, float_arithmetic=True).run(window)
    np.testing.assert_allclose(found, expected, atol=0.1)
    fp32 = OnnxEngine(whisper.graphs["fp32"].file).run(window)
    with torch.inference_mode():
        logits, _ = whisper.network.load()(torch.from_numpy(window))
    np.testing.assert_allclose(logits, fp32, atol=1e-4)


def test_random_weights_are_those_of_whisper_base_only(home, tmp_path):
    (tmp_path / "other.toml").write_text(RECIPE.replace("whisper-base-encoder", "whisper-large"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "RECIPES", tmp_path)
        model = model_of("other", None, tmp_path / "out", None)
    assert model.network == model.graphs["int8"]
    assert model.network.startswith("there are random weights of whisper-base-encoder only, not of")


# torch, on the processor


@pytest.mark.parametrize("subject", ["small", "whisper"])
@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 1e-5), ("fp16", 1e-5, 0.02)])
def test_torch_answers_as_the_graph_does(subject, precision, least, most, request):
    network = request.getfixturevalue(subject).network
    windows = np.stack(synthetic_speech(2, 0.5, seed=3))
    engine, facts = open_torch(False, False, network, precision, 2, 8000, device="cpu")
    expected = OnnxEngine(network.weights.reference).run(windows)
    for _ in range(2):
        off = np.abs(engine.run(windows) - expected).max() / np.abs(expected).max()
        assert least <= off < most
    other = engine.run(windows[::-1].copy())
    np.testing.assert_allclose(other, expected[::-1], atol=most * np.abs(expected).max())
    assert ("autocast" in facts["detail"]) == (precision == "fp16")
    engine.close()


def test_half_are_layers_and_not_what_hears_samples(small, whisper):
    for network, kept in (
        (small.network.load(), "encoder.model.feature_extractor.conv_layers.0.conv.inner.weight"),
        (whisper.network.load(), "encoder.mel.inner.basis"),
    ):
        halve(network, "cpu")
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        halves = {name for name, tensor in tensors.items() if tensor.dtype == torch.float16}
        assert tensors[kept].dtype == torch.float32
        layers = {n for n in tensors if n.endswith(("q_proj.weight", "q_proj.bias"))}
        assert layers and layers <= halves
        norms = {n for n in tensors if "layer_norm" in n}
        assert norms and not norms & halves


@without_gpu
def test_torch_without_a_gpu_is_its_own_line(small):
    with pytest.raises(DeviceError, match=r"^torch: \w+: .*(CUDA|NVIDIA)"):
        open_torch(False, False, small.network, "fp32", 1, 8000)


# one cell


def cell(model, precision, batch):
    graph = model.graphs[precision]
    expected = expected_of(graph.weights, 8000, ())
    return Cell("torch", precision, batch, 8000, 5, graph, expected, ()), expected


@pytest.fixture
def played(monkeypatch):
    """Let an engine with given logits be what the runtime 'torch' opens."""

    def play(*logits):
        engine = FakeEngine(*logits)
        opened = replace(RUNTIMES["torch"], open=lambda *_: (engine, {"size_mb": 1.5}))
        monkeypatch.setitem(RUNTIMES, "torch", opened)
        return engine

    return play


def test_a_cell_is_warmed_up_timed_and_compared(small, played):
    one, expected = cell(small, "fp32", 8)
    engine = played(expected.logits[0])
    row = measure_cell(one)
    assert len(row["samples_ms"]) == 5
    assert {call.shape for call in engine.calls} == {(8, 8000)}
    probes = [np.resize(p, 8000) for p in synthetic_speech(PROBES, 1.0, seed=4)]
    np.testing.assert_array_equal(engine.calls[0], np.stack(probes * 2))
    off = np.abs(expected.logits - expected.logits[0]).max() / np.abs(expected.logits).max()
    assert row["off"] == pytest.approx(off)
    assert engine.closed and row["size_mb"] == 1.5
    assert row["accuracy"]["not_measured"].startswith("not trained (")


def test_logits_that_are_no_numbers_are_no_measurement(small, played):
    one, _ = cell(small, "fp32", 1)
    played([float("nan")] * 3)
    with pytest.raises(EngineError, match="logits are NaN or infinity"):
        measure_cell(one)


def test_a_short_window_is_repeated_as_engines_of_fixed_shape_hear_it():
    engine = FakeEngine([1.0, 2.0])
    filled = Filled(engine, 7)
    np.testing.assert_array_equal(filled.run(np.array([[1, 2, 3]], np.float32)), [[1, 2]])
    np.testing.assert_array_equal(engine.calls[0], [[1, 2, 3, 1, 2, 3, 1]])
    assert (filled.device, filled.graph) == ("fake", "fake.onnx")


# from end to end


def measure(folder, *arguments):
    words = ["gpu", "--out", folder / "out", "--json", folder / "r.json", *arguments]
    assert main(list(map(str, words))) == 0
    return json.loads((folder / "r.json").read_text())


def by_cell(result):
    keys = ("model", "precision", "runtime", "batch")
    return {tuple(row[key] for key in keys): row for row in result["rows"]}


@pytest.fixture(scope="module")
def nowhere(small, home, checkpoint, bundle):
    """Measured where there is no GPU."""
    return measure(
        home, f"small={checkpoint}", f"loud={bundle}", "--window", 0.5, "--runs", 3,
        "--markdown", home / "r.md", "--plot", home / "r.png",
    )  # fmt: skip


@without_gpu
def test_every_cell_is_there_with_its_error(nowhere):
    cells = by_cell(nowhere)
    assert len(cells) == len(nowhere["rows"]) == 2 * 3 * len(RUNTIMES) * 2
    reasons = {key: row["not_measured"] for key, row in cells.items()}

    def of(runtime, precision, model="small"):
        return {reasons[model, precision, runtime, batch] for batch in (1, 32)}

    for precision in ("fp32", "fp16", "int8"):
        assert of("tensorrt", precision) == {
            "No module named 'tensorrt'; on a Jetson it comes with JetPack, elsewhere: pip install "
            "tensorrt"
        }
        (line,) = of("tensorrt_rtx", precision)
        assert line.startswith(("CUDA: cudaError", "No module named 'tensorrt_rtx'; pip install"))
    for runtime in ("torch", "torch-compile", "torch-graph", "torch-compile-graph"):
        for precision in ("fp32", "fp16"):
            (line,) = of(runtime, precision)
            assert line.startswith("torch: ") and ("CUDA" in line or "NVIDIA" in line)
            (line,) = of(runtime, precision, "loud")
            assert line.startswith("torch needs the folder of a run of a recipe")
        assert of(runtime, "int8") == {"torch has no INT8 convolution for a GPU"}
    for precision in ("fp32", "fp16"):
        (line,) = of("onnxruntime", precision)
        assert line.startswith("device 'cuda' needs CUDAExecutionProvider, this ONNX Runtime has ")
    assert of("onnxruntime", "int8") == {"ONNX Runtime would send INT8 back to the processor"}
    assert of("tensorrt", "fp16", "loud") == of("onnxruntime", "fp16", "loud")
    assert of("tensorrt", "fp16", "loud").pop().endswith("bundle has no model_fp16.onnx")


@without_gpu
def test_work_is_counted_even_so(nowhere):
    floors = {(row["model"], row["precision"]): row for row in nowhere["floors"]}
    assert set(floors) == {("small", p) for p in ("int8", "fp16", "fp32")} | {
        ("loud", "int8"), ("loud", "fp32"),
    }  # fmt: skip
    assert floors["loud", "fp32"]["macs"] == {"int8": 0, "fp16": 0, "fp32": 3}
    assert floors["small", "int8"]["macs"]["int8"] > 0
    assert {row["not_measured"] for row in floors.values()} == {"no GPU is known here"}
    assert nowhere["gpu"]["not_measured"].startswith("CUDA: cudaError")


@without_gpu
def test_the_tables_have_a_line_for_each_cell(nowhere, home):
    lines = (home / "r.md").read_text().splitlines()
    for batch in (1, 32):
        for precision in ("int8", "fp16", "fp32"):
            for runtime in RUNTIMES.values():
                start = f"| {batch}, {precision}, {runtime.title} | not measured: "
                assert sum(line.startswith(start) for line in lines) == 2
    assert "# GPU: not known" in lines
    assert (home / "r.png").read_bytes().startswith(b"\x89PNG")


PLAYED = """
import sys
import cuda.bindings
from tests.fake_gpu import FakeRuntime, fake_tensorrt
cuda.bindings.runtime = FakeRuntime(name=b"NVIDIA L4", capability=(8, 9))
sys.modules["tensorrt"] = fake_tensorrt(cuda.bindings.runtime)
"""


@pytest.fixture(scope="module")
def on_l4(tmp_path_factory, bundle):
    """Return what measures on a machine that plays an L4; every process of it plays along."""
    home = tmp_path_factory.mktemp("l4")
    (home / "sitecustomize.py").write_text(PLAYED)
    lines = ["path,emotion"]
    for name, amplitude, emotion in (
        ("a", 0.05, "calm"), ("b", 0.2, "lively"), ("c", 0.5, "calm"), ("d", 0.9, "loud"),
        ("e", 0.9, ""), ("f", 0.9, "loud"),
    ):  # fmt: skip
        samples = np.full(9000, amplitude, np.float32)  # two windows, the second too short
        soundfile.write(home / f"{name}.wav", samples, 16_000, subtype="FLOAT")
        lines.append(f"{name}.wav,{emotion}")
    (home / "clips.csv").write_text("\n".join(lines))

    def run(*more, clips=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{home}{os.pathsep}{ROOT}")
            return measure(
                home, f"loud={bundle}", "--runtimes", "tensorrt", "--batches", "1,4",
                "--window", 0.5, "--runs", 7, *(["--manifest", home / "clips.csv"] * clips),
                "--markdown", home / "r.md", "--plot", home / "r.png", *more,
            )  # fmt: skip

    return run, home


@pytest.fixture(scope="module")
def first(on_l4):
    return on_l4[0]()


def test_cells_are_measured(first):
    cells = by_cell(first)
    assert len(cells) == 6
    for precision in ("int8", "fp32"):
        for batch in (1, 4):
            row = cells["loud", precision, "tensorrt", batch]
            assert "not_measured" not in row, row["not_measured"]
            assert row["device"] == "NVIDIA L4, tensorrt 10.3.0"
            assert len(row["samples_ms"]) == 7
            assert row["stats"]["p50_ms"] == sorted(row["samples_ms"])[3]
            assert row["windows_per_s"] == batch / row["stats"]["p50_ms"] * 1e3
            assert row["off"] < 1e-5
            assert row["build_s"] < row["load_s"]
            assert row["floor_ms"] == pytest.approx(24 / 300e9 * 1e3)
            assert row["of_floor"] == row["stats"]["p50_ms"] / row["floor_ms"]
    assert "not_measured" in cells["loud", "fp16", "tensorrt", 1]
    assert first["gpu"]["name"] == "NVIDIA L4" and first["gpu"]["cuda"] == "13.0"


def test_clips_are_scored_at_batch_1(first):
    cells = by_cell(first)
    for precision in ("int8", "fp32"):
        accuracy = cells["loud", precision, "tensorrt", 1]["accuracy"]
        assert accuracy == {
            "clips": 6, "labels_equal": 1.0, "reference": "model.onnx",
            "ua": pytest.approx((1 / 2 + 1 + 1) / 3),
        }  # fmt: skip
        assert "not_measured" in cells["loud", precision, "tensorrt", 4]["accuracy"]


def test_what_was_measured_is_not_measured_again(on_l4, first):
    run, home = on_l4
    file = home / "out" / "cells.jsonl"
    kept = file.read_text()
    assert kept.count("\n") == 4
    assert run()["rows"] == first["rows"]
    assert file.read_text() == kept
    file.write_text(kept[:-20])  # killed as it wrote the last
    again = run()
    assert [row.get("samples_ms") == one.get("samples_ms") for row, one in zip(
        again["rows"], first["rows"], strict=True
    )] == [True] * 5 + [False]  # fmt: skip
    assert run()["rows"] == again["rows"]
    fewer = run(clips=False)["rows"]
    for row, one in zip(fewer, again["rows"], strict=True):
        # Clips are asked one by one: what they change is those cells.
        if "samples_ms" in one:
            assert (row == one) == (one["batch"] == 4)
    other = run("--runs", 3)
    assert {len(row["samples_ms"]) for row in other["rows"] if "samples_ms" in row} == {3}


def test_the_table_of_a_measured_cell(on_l4, first):
    text = (on_l4[1] / "r.md").read_text()
    (line,) = (row for row in text.splitlines() if row.startswith("| 1, int8, TensorRT |"))
    assert line.count("|") == 10
    assert line.endswith("| 100.0% of 6 | 0.833 |")
    assert text.startswith("# GPU: NVIDIA L4\n")
    assert (on_l4[1] / "r.png").read_bytes().startswith(b"\x89PNG")


# the command line


def test_prepare_makes_the_graphs_and_stops(small, checkpoint, home, capsys):
    words = ["gpu", f"small={checkpoint}", "--out", str(home / "out"), "--prepare"]
    assert main(words) == 0
    made = home / "out" / "small" / "made"
    assert capsys.readouterr().out == (
        f"small int8: {made}/model_int8_fp16.onnx\nsmall fp16: {made}/model_fp16.onnx\n"
        f"small fp32: {made}/model.onnx\n"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["huge"], "argument MODEL: 'huge'; allowed: default, "),
        (["huge=none"], "argument MODEL: 'none' is no folder"),
        (["tiny", "tiny=here"], "argument MODEL: tiny, tiny; allowed: different names"),
        (["--runtimes", "cuda"], "argument --runtimes: 'cuda'; allowed: some of tensorrt, "),
        (["--batches", "0"], "argument --batches: '0'; allowed: different numbers from 1"),
        (["--window", "0.4"], "argument --window: '0.4'; allowed: 0.5 or more"),
        (["--window", "nan"], "argument --window: 'nan'; allowed: 0.5 or more"),
        (["--runs", "0"], "argument --runs: '0'; allowed: 1 or more"),
        (["--runs", "1.5"], "argument --runs: '1.5'; allowed: 1 or more"),
        (["--out", "no/where"], "argument --out: 'no/where': make its folder first"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--out", "out", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"benchmarks: {line}")
    assert said.err.count("\n") == 1


def test_a_manifest_that_is_none_is_one_line_and_exit_1(bundle, tmp_path, capsys):
    (tmp_path / "clips.csv").write_text("name\na.wav\n")
    words = ["gpu", f"loud={bundle}", "--out", tmp_path / "out", "--manifest"]
    assert main([*map(str, words), str(tmp_path / "clips.csv")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: manifest ") and "needed is a column 'path'" in line


def test_help_teaches_by_examples():
    command = [sys.executable, "-m", "benchmarks", "gpu", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks gpu default=RUN/default/seed2 --weights" in done.stdout
