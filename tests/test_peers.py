import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx.numpy_helper import to_array
from scipy.spatial.distance import cosine
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
)

from benchmarks import subjects
from benchmarks.__main__ import main
from benchmarks.agreement import frame_cosine, graph_answers, labels_equal, torch_answers
from benchmarks.machine import ROOT
from benchmarks.peers import CALIBRATION_S, Prepared, load_network, measure, systems_of
from benchmarks.prepare import CALIBRATION, calibration_windows, prepare
from benchmarks.quantizers import QUANTIZERS, make_ours_of_random, run_quantizer
from benchmarks.turns import in_child
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.errors import AudioError
from edge_ser.timing import noise
from export.centre import centre
from export.errors import RecipeError
from export.probe import tensor_values
from export.smooth import even_out
from tests.test_wav2vec2 import SIZES

ROWS = [name for quantizer in QUANTIZERS for name in quantizer.rows]
SYSTEMS = ["ONNX FP32", "torch FP32, eager", "torch FP32, compiled", *ROWS]
LENGTHS = [0.5, 1.0]


# arithmetic


def answers(seed, frames):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=4), rng.normal(size=(f, 5)).astype(np.float32)) for f in frames]


def test_frames_of_all_windows_count_alike():
    a, b = answers(0, (3, 7)), answers(1, (3, 7))
    found = frame_cosine(a, b)
    pairs = zip(np.concatenate([s for _, s in a]), np.concatenate([s for _, s in b]), strict=True)
    assert found == pytest.approx(np.mean([1 - cosine(x, y) for x, y in pairs]), abs=1e-7)
    assert frame_cosine(a, a) == pytest.approx(1)
    louder = [(logits, 3 * states) for logits, states in a]
    assert frame_cosine(a, louder) == pytest.approx(1)


def test_labels_are_counted():
    def logits(*labels):
        return [(np.eye(3)[label], np.ones((1, 1))) for label in labels]

    assert labels_equal(logits(0, 1, 2, 0), logits(0, 1, 2, 2)) == 0.75


def test_other_numbers_of_windows_are_a_fault():
    with pytest.raises(ValueError):
        frame_cosine(answers(0, (3, 7)), answers(1, (3,)))


# what is heard


def test_a_shorter_clip_is_repeated_and_a_longer_one_cut(tmp_path):
    samples = np.arange(12_000, dtype=np.float32) / 24_000
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    short, long = (subjects.read_windows([tmp_path / "a.wav"], s)[0] for s in (0.5, 1.0))
    np.testing.assert_array_equal(short, samples[:8000])
    np.testing.assert_array_equal(long, np.concatenate([samples, samples[:4000]]))


def test_synthetic_speech_is_seeded_and_of_the_length_asked_for():
    first, again = (subjects.synthetic_speech(3, 0.5, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert [(one.shape, one.dtype) for one in first] == [((8000,), np.float32)] * 3
    assert not np.array_equal(first[0], first[1])
    assert max(np.abs(one).max() for one in first) < 0.6


def test_calibration_takes_clips_from_the_whole_manifest(tmp_path):
    for number in range(80):
        samples = np.full(8000, number / 100, np.float32)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16_000, subtype="FLOAT")
    lines = ["path", *(f"{number}.wav" for number in range(80))]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    windows = calibration_windows(tmp_path / "clips.csv")
    levels = [round(float(window[0]) * 100) for window in windows]
    assert levels == list(range(0, 80, 3))
    assert {len(window) for window in windows} == {round(CALIBRATION_S * 16_000)}
    assert len(calibration_windows(None)) == CALIBRATION


def test_sizes_are_those_of_the_networks_that_they_are_named_after():
    millions = []
    for changes in subjects.SIZES.values():
        with torch.device("meta"):
            model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(num_labels=7, **changes))
        millions.append(sum(tensor.numel() for tensor in model.parameters()) / 1e6)
    assert millions == pytest.approx([94.6, 315.7], abs=0.1)


# from end to end


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = Wav2Vec2Config(**SIZES | {"num_hidden_layers": 1}, classifier_proj_size=16)
    model = Wav2Vec2ForSequenceClassification(config)
    with torch.no_grad():  # of a new network all norms are 1 and biases 0
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def hide_tools(home, patch):
    for package in ("torch", "optimum", "modelopt"):
        (home / f"{package}.py").write_text(f"raise ImportError(\"No module named '{package}'\")\n")
    patch.syspath_prepend(home)
    patch.setenv("CXX", "no-compiler")


def words_of(checkpoint, out, home):
    words = [
        "peers", checkpoint, "--out", out, "--windows", "0.5,1", "--threads", "1", "--runs", "2",
        "--json", home / "r.json", "--markdown", home / "r.md", "--plot", home / "r.png",
    ]  # fmt: skip
    return list(map(str, words))


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    """Measured where torch, optimum, modelopt and a C++ compiler are not there.

    That is quick. The processes that measure find none of them; this one has made the graph.
    """
    home = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        hide_tools(home, patch)
        assert main(words_of(checkpoint, home / "out", home)) == 0
    return json.loads((home / "r.json").read_text()), home


DYING = """import os, pathlib
seen = pathlib.Path({seen!r})
with seen.open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
if len(set(seen.read_text().split())) in {dying}:
    os._exit(9)
raise ImportError("No module named 'torch'")
"""


def test_a_run_that_dies_goes_on_and_a_system_that_dies_is_a_row(
    measured, checkpoint, tmp_path, capfd
):
    """Torch kills the second process that imports it, which times 1 s, and the fifth."""
    first, home = measured
    seen, words = tmp_path / "seen", words_of(checkpoint, home / "out", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        hide_tools(tmp_path, patch)
        (tmp_path / "torch.py").write_text(DYING.format(seen=str(seen), dying=(2, 5)))
        assert main(words) == 1
        line = "benchmarks: a measuring process died; is the memory full?"
        assert capfd.readouterr().err.splitlines()[-1] == line
        kept = home / "out" / "measured" / "threads 1, 0.5 s"
        rows = json.loads((kept / "measured.json").read_text())
        assert main(words) == 0
        assert capfd.readouterr().err.count(f"{kept}: nothing changed") == 1
    result = json.loads((tmp_path / "r.json").read_text())
    for row, before in zip(result["rows"], rows, strict=False):
        assert row.items() >= before.items()
    assert len(result["rows"]) == len(first["rows"])
    answers = {row["system"]: row for row in result["answers"]}
    dead = {"system": SYSTEMS[1], "not_measured": "its process died; is the memory full?"}
    expected = {row["system"]: row for row in first["answers"]} | {SYSTEMS[1]: dead}
    assert answers == expected
    assert len(set(seen.read_text().split())) == 5
    assert not (home / "out" / "measured").exists()


def test_what_was_measured_with_other_threads_is_not_taken(measured, checkpoint, tmp_path):
    _, home = measured
    prepared = Prepared(checkpoint, home / "out" / "fp32" / "model.onnx", (), {})
    clips = {0.5: subjects.synthetic_speech(1, 0.5, seed=3)}
    with pytest.MonkeyPatch.context() as patch:
        hide_tools(tmp_path, patch)
        for count in (1, 2):
            found = measure(prepared, clips, tmp_path / "kept", threads=[count], runs=1)
            assert {row["threads"] for row in (*found["rows"], *found["loads"])} == {count}


MISSING = {name: "modelopt" if "modelopt" in name else "optimum" for name in ROWS[:5]}


def test_every_system_has_a_row_for_each_length(measured):
    result, _ = measured
    found = [(row["window_s"], row["system"]) for row in result["rows"]]
    assert found == [(seconds, name) for seconds in LENGTHS for name in SYSTEMS]
    assert [row["system"] for row in result["loads"]] == SYSTEMS


def test_what_cannot_be_measured_says_what_to_install(measured):
    result, _ = measured
    expected = {
        name: f"No module named '{package}'; run: pip install -e \".[peers]\""
        for name, package in MISSING.items()
    }
    compiled = "torch.compile needs a C++ compiler, and there is no 'no-compiler'"
    expected |= {"torch FP32, eager": "No module named 'torch'", "torch FP32, compiled": compiled}
    for cells in (result["rows"][:11], result["rows"][11:], result["loads"], result["answers"]):
        reasons = {c["system"]: c["not_measured"] for c in cells if "not_measured" in c}
        assert reasons == expected


def test_times_are_compared_round_by_round_with_the_full_precision_graph(measured):
    result, _ = measured
    for rows in (result["rows"][:11], result["rows"][11:]):
        reference_ms = rows[0]["samples_ms"]["engine"]
        for row in (rows[0], *rows[-3:]):
            engine_ms = row["samples_ms"]["engine"]
            ratios = [a / b for a, b in zip(reference_ms, engine_ms, strict=True)]
            assert len(ratios) == 2
            assert row["speedup"] == pytest.approx(np.median(ratios))
            assert row["detail"]


def test_sizes_are_those_of_the_files(measured):
    result, home = measured
    ours = home / "out" / "edge_ser"
    files = [ours / "model_int8_x86.onnx", ours / "model_int8.bin"]
    loads = {row["system"]: row for row in result["loads"]}
    row = loads["edge_ser INT8"]
    assert row["file_mb"] == pytest.approx(sum(file.stat().st_size for file in files) / 1e6)
    graph = home / "out" / "onnxruntime_static" / "model.onnx"
    row = loads["ONNX Runtime static, all operators"]
    assert row["file_mb"] == graph.stat().st_size / 1e6
    assert row["peak_memory_mb"] > 0


def test_answers_are_compared_at_each_length(measured):
    result, _ = measured
    found = {row["system"]: row for row in result["answers"]}
    for window, seconds in zip(found["ONNX FP32"]["windows"], LENGTHS, strict=True):
        assert window == {"window_s": seconds, "labels_equal": 1, "frame_cosine": pytest.approx(1)}
    for name in ROWS[5:]:
        for window in found[name]["windows"]:
            assert 0.95 < window["frame_cosine"] < 0.999999
            assert 0 <= window["labels_equal"] <= 1


def test_hidden_states_are_those_of_transformers(measured, checkpoint):
    _, home = measured
    fp32 = home / "out" / "fp32" / "model.onnx"
    (samples,) = subjects.synthetic_speech(1, 0.7, seed=3)
    ((logits, states),) = graph_answers(fp32, fp32, [samples])
    model = Wav2Vec2ForSequenceClassification.from_pretrained(checkpoint).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(checkpoint)
    heard = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = model.wav2vec2(heard).last_hidden_state[0].numpy()
        np.testing.assert_allclose(logits, model(heard).logits[0], atol=1e-4)
    np.testing.assert_allclose(states, expected, atol=1e-4)


def test_what_centring_and_smoothing_moved_is_moved_back(measured, tmp_path):
    _, home = measured
    fp32, smooth = home / "out" / "fp32" / "model.onnx", tmp_path / "smooth.onnx"
    windows = subjects.synthetic_speech(2, 0.7, seed=3)
    model = onnx.load(fp32)
    centre(model, ["projector"], windows)
    even_out(model, ["projector"], windows, 0.75)
    onnx.save(model, smooth)
    (projector,) = (node for node in model.graph.node if node.name == "projector")
    exact, found = graph_answers(fp32, fp32, windows), graph_answers(fp32, smooth, windows)
    inside = tensor_values(model, [projector.input[0]], windows)
    for one, other, divided in zip(exact, found, inside, strict=True):
        np.testing.assert_allclose(other[1], one[1], atol=1e-4)
        moved = one[1] - divided[projector.input[0]][0]
        assert np.abs(moved).max() > 0.1
        assert np.abs(moved.mean(axis=0)).max() > 0.01
        np.testing.assert_allclose(other[0], one[0], atol=1e-4)


def test_the_tables_tell_all_and_what_the_clips_were(measured):
    result, home = measured
    text = (home / "r.md").read_text()
    assert "Calibrated with 32 windows of 3 s of synthetic sounds." in text
    assert "Agreement is on synthetic sounds." in text
    for name in SYSTEMS:
        lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert len(lines) == 2
        missing = name in MISSING or "torch" in name
        assert all(("not measured" in line) == missing for line in lines)
        assert {line.count("|") for line in lines} == {8}  # six columns behind the name
    assert (home / "r.png").read_bytes().startswith(b"\x89PNG")
    assert {"onnxruntime", "torch"} <= result["versions"].keys()


def test_graphs_are_kept_until_what_they_are_made_of_changes(measured, checkpoint, capsys):
    _, home = measured
    out = home / "out"
    made = {file: file.stat().st_mtime_ns for file in out.glob("*/*.onnx")}
    assert len(made) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.prepare.QUANTIZERS", QUANTIZERS[4:5])
        again = prepare(checkpoint, calibration_windows(None), out)
        assert capsys.readouterr().err.count("nothing changed") == 2
        assert again.refused == {}
        assert made == {file: file.stat().st_mtime_ns for file in out.glob("*/*.onnx")}
        prepare(checkpoint, calibration_windows(None)[:4], out)
        assert capsys.readouterr().err.count("nothing changed") == 1
    changed = [f for f, when in made.items() if f.stat().st_mtime_ns != when]
    assert changed == [out / "onnxruntime_dynamic" / "model.onnx"]


def test_a_tool_that_fails_is_a_row_and_an_older_graph_of_it_is_not_taken(
    measured, checkpoint, monkeypatch
):
    _, home = measured
    broken = replace(QUANTIZERS[4], make=math.dist)  # takes two arguments
    monkeypatch.setattr("benchmarks.prepare.QUANTIZERS", (broken,))
    prepared = prepare(checkpoint, calibration_windows(None)[:3], home / "out")
    assert (home / "out" / "onnxruntime_dynamic" / "model.onnx").exists()
    reason = "TypeError: dist expected 2 arguments, got 3"
    assert prepared.refused == {"ONNX Runtime dynamic": reason}


def test_torch_runs_and_answers_as_its_graph_does(measured, checkpoint, monkeypatch):
    _, home = measured
    fp32 = home / "out" / "fp32" / "model.onnx"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # both are set below, and set back
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    eager = systems_of(Prepared(checkpoint, fp32, (), {}))[1]
    loaded = eager.load(0.5, 1)
    logits, _ = loaded.turns["engine"]()
    (expected, _) = graph_answers(fp32, fp32, [noise(0.5, 16_000)])[0]
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
    assert loaded.settle()["attention"].startswith(("eager attention", "sdpa attention"))
    network, _ = load_network(checkpoint)
    assert loaded.facts["file_mb"] == sum(p.nbytes for p in network.parameters()) / 1e6
    windows = subjects.synthetic_speech(2, 0.7, seed=3)
    found, expected = torch_answers(network, network, windows), graph_answers(fp32, fp32, windows)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-4)
        np.testing.assert_allclose(one[1], other[1], atol=1e-4)


def make_each(quantizers, fp32, windows, home):
    for quantizer in quantizers:
        (home / quantizer.name).mkdir()
        run_quantizer(quantizer, fp32, windows, home / quantizer.name)


def quantized_products(file):
    """Count the MatMul nodes of two dequantized factors: of one layer 6, and before and behind."""
    nodes = onnx.load(file).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return sum(n.op_type == "MatMul" and set(n.input) <= dequantized for n in nodes)


TOOLS = {"optimum": QUANTIZERS[:2], "modelopt": QUANTIZERS[2:4]}


@pytest.mark.parametrize("package", TOOLS)
def test_graphs_of_other_tools_answer_as_full_precision_does(package, measured, tmp_path):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    fp32 = measured[1] / "out" / "fp32" / "model.onnx"
    # In a process of its own, for they change ONNX Runtime's quantizer.
    in_child(make_each, TOOLS[package], fp32, calibration_windows(None)[:4], tmp_path)
    windows = subjects.synthetic_speech(2, 0.7, seed=3)
    exact = graph_answers(fp32, fp32, windows)
    for quantizer in TOOLS[package]:
        for file, _ in quantizer.rows.values():
            found = graph_answers(fp32, tmp_path / quantizer.name / file, windows)
            assert 0.95 < frame_cosine(exact, found) < 0.999999
            engine = OnnxEngine(tmp_path / quantizer.name / file, threads=1)
            assert engine.run(windows[0][None]).shape == (1, 2)
    for quantizer in TOOLS[package][1:]:  # static, and the better settings of modelopt
        for file, _ in quantizer.rows.values():
            assert quantized_products(tmp_path / quantizer.name / file) == 8
    left = {file.name for file in tmp_path.glob("*/*")}
    assert left <= {"model.onnx", "model_u8.onnx", "config.json", "ort_config.json"}


def test_ours_of_a_random_network_has_the_nodes_of_ours(measured, tmp_path):
    """So it takes as long."""
    _, home = measured
    make_ours_of_random(home / "out/fp32/model.onnx", calibration_windows(None), tmp_path)
    graphs = [
        onnx.load(folder / "model_int8_x86.onnx").graph
        for folder in (home / "out/edge_ser", tmp_path)
    ]
    one, other = ([(n.op_type, *n.input, *n.output) for n in graph.node] for graph in graphs)
    assert one == other
    weights, others = ({t.name: to_array(t) for t in graph.initializer} for graph in graphs)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not np.array_equal(weights[name], others[name])]


# faults


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "one of CHECKPOINT and --random is needed"),
        (["here", "--random", "base"], "one of CHECKPOINT and --random is needed"),
        (["none"], "argument CHECKPOINT: 'none' is not there"),
        (["here", "--runs", "0"], "argument --runs: 0; allowed: 1 or more"),
        (["here", "--clips", "here"], "argument --clips: no .wav, .flac, .ogg, .mp3 in 'here'"),
        (["here", "--windows", "1,0.3"],
         "argument --windows: '1,0.3'; allowed: different numbers from 0.4 to 30"),
        (["here", "--windows", "1,1"],
         "argument --windows: '1,1'; allowed: different numbers from 0.4 to 30"),
        (["here", "--windows", "x"],
         "argument --windows: 'x'; allowed: different numbers from 0.4 to 30"),
        (["here", "--out", "no/where"], "argument --out: 'no/where': make its folder first"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["peers", "--out", "out", *arguments])
    assert (stopped.value.code, capsys.readouterr()) == (2, ("", f"benchmarks: {line}\n"))


def test_what_cannot_be_used_is_one_line_and_exit_1(checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    WhisperConfig().save_pretrained(other)
    config = other / "config.json"
    assert main(["peers", str(other), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"benchmarks: '{config}': 'whisper'; allowed are wav2vec2, hubert, wavlm\n"
    )
    with pytest.raises(RecipeError, match="cannot be read"):
        prepare(tmp_path, [], tmp_path / "out")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_text("text")
    with pytest.raises(AudioError):
        subjects.read_windows([tmp_path / "clips" / "a.wav"], 1.0)
    more = ["--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "out")]
    assert main(["peers", str(checkpoint), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: ")
    assert "a.wav" in line


def test_help_teaches_by_examples():
    command = [sys.executable, "-m", "benchmarks", "peers", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks peers ./my-wav2vec2" in done.stdout
