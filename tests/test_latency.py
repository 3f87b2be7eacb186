import json
import subprocess
import sys

import pytest

from benchmarks import latency
from benchmarks.__main__ import main
from benchmarks.machine import ROOT
from edge_ser.bundle import MODELS, sha256
from edge_ser.testing import make_bundle
from tests.speech_corpus import make_whisper

RECIPE = """
name = "default"
data = { corpora = ["a"], labels = ["calm", "loud"] }
windows = { window_s = 3.0, hop_s = 1.0 }
encoder = { family = "whisper", source = "whisper", layers = 2 }
train = { epochs = 1 }
"""


# arithmetic


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians():
    assert latency.ratio([10.0, 60.0, 8.0], [1.0, 2.0, 4.0]) == 10.0  # of 10, 30, 2; not 10 / 2


def rows():
    return [
        {"system": "A", "samples_ms": {"engine": [300.0, 600.0, 90.0]}},
        {"system": "B", "samples_ms": {"engine": [3.0, 2.0, 1.0], "end_to_end": [3.5, 2.1, 9.0]}},
        {"system": "C", "not_measured": "no weights"},
    ]


def test_statistics_are_as_counted_by_hand():
    a, b, c = latency.add_statistics(rows(), window_s=2.0)
    assert (a["speedup"], a["stats"]["engine"]["p50_ms"], a["rtf"]) == (1.0, 300.0, 0.15)
    assert b["speedup"] == 100.0  # of 100, 300, 90
    assert b["predict_adds_ms"] == 0.5  # of 0.5, 0.1, 8
    assert [b["stats"][turn]["p99_ms"] for turn in ("engine", "end_to_end")] == [3.0, 9.0]
    assert c == {"system": "C", "not_measured": "no weights"}


def test_without_the_first_system_there_is_no_speedup():
    c, b = latency.add_statistics(rows()[:0:-1], window_s=3.0)
    assert (c["system"], b["system"], b["speedup"]) == ("C", "B", None)
    assert b["stats"]["engine"]["p50_ms"] == 2.0


# from end to end


def measure(folder, *arguments):
    words = ["latency", "--window", "0.5", "--json", folder / "result.json", *arguments]
    assert main(list(map(str, words))) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Two bundles, one without full precision, on a machine that has no torch."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    bundles = [make_bundle(folder / name, fp32=name == "both") for name in ("both", "small")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return measure(
            folder, "--bundles", *bundles, "--threads", "1,2", "--runs", 4,
            "--markdown", folder / "table.md", "--plot", folder / "plot.png",
        ), folder  # fmt: skip


NAMES = [
    "torch FP32 wav2vec2-base", "torch FP32 default", "ONNX FP32 both", "ONNX INT8 both",
    "ONNX FP32 small", "ONNX INT8 small",
]  # fmt: skip
REASONS = {
    0: "No module named 'torch'",
    1: "needs --weights, the pretrained encoder",
    4: "the bundle has no model.onnx",
}  # fmt: skip


def test_every_system_has_a_row_for_each_number_of_threads(without_torch):
    found = [(row["threads"], row["system"]) for row in without_torch[0]["rows"]]
    assert found == [(threads, name) for threads in (1, 2) for name in NAMES]


def test_what_cannot_be_measured_says_why(without_torch):
    result, _ = without_torch
    for cells in (result["rows"][:6], result["rows"][6:], result["loads"]):
        reasons = {i: row["not_measured"] for i, row in enumerate(cells) if "not_measured" in row}
        assert reasons == REASONS


def test_a_measured_row_holds_every_sample_and_names_its_file(without_torch):
    result, folder = without_torch
    row = result["rows"][3]
    assert {turn: len(values) for turn, values in row["samples_ms"].items()} == {
        "engine": 4,
        "end_to_end": 4,
    }
    assert row["graph"].startswith("model_int8")
    assert row["graph_sha256"] == sha256(folder / "both" / row["graph"])
    assert row["bundle_sha256"] == sha256(folder / "both" / "metadata.json")
    assert result["rows"][2]["graph"] == "model.onnx"
    assert row["speedup"] is None  # there is no torch to compare with


def test_loading_and_memory_are_measured(without_torch):
    row = without_torch[0]["loads"][3]
    assert row["system"] == "ONNX INT8 both"
    assert min(row["load_ms"], row["first_run_ms"], row["peak_memory_mb"]) > 0


def test_a_cold_start_is_compared_with_the_imports(without_torch):
    cold = without_torch[0]["cold"]
    if (MODELS / "default").is_dir():
        assert [len(values) for values in cold["samples_ms"].values()] == [4, 4, 4]
        assert cold["ratios"][0] == 1.0
        assert min(cold["ratios"][1:]) > 1
    else:
        assert cold["not_measured"].startswith(
            "edge-ser predict calm.flac failed: edge-ser: no bun"
        )


def test_the_result_names_machine_versions_and_protocol(without_torch):
    result, _ = without_torch
    assert (result["schema"], result["benchmark"]) == (1, "latency")
    assert result["protocol"] == {"window_s": 0.5, "runs": 4, "warm_up": 3}
    assert {"date", "commit", "machine", "versions"} <= result.keys()
    assert {"numpy", "onnxruntime"} <= result["versions"].keys()


def test_table_and_plot_are_written(without_torch):
    _, folder = without_torch
    lines = (folder / "table.md").read_text().splitlines()
    assert (
        "| ONNX FP32 small | 2 | not measured: the bundle has no model.onnx |  |  |  |  |  |"
        in lines
    )
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_torch_is_measured_and_the_speedup_is_against_wav2vec2(tmp_path):
    make_whisper(tmp_path / "whisper")
    (tmp_path / "default.toml").write_text(RECIPE)
    bundle = make_bundle(tmp_path / "bundle")
    options = ["--recipes", tmp_path, "--weights", tmp_path, "--threads", 1, "--runs", 1]
    result = measure(tmp_path, "--bundles", bundle, *options)
    wav2vec2, default, _, int8 = result["rows"]
    assert wav2vec2["detail"].startswith(("random weights; sdpa", "random weights; eager"))
    assert (wav2vec2["speedup"], default["detail"]) == (1.0, "random head")
    (reference_ms,), (int8_ms,) = (row["samples_ms"]["engine"] for row in (wav2vec2, int8))
    assert int8["speedup"] == reference_ms / int8_ms


# wrong usage


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--threads", "1,0"], "argument --threads: '1,0'; allowed: different numbers from 1"),
        (["--threads", "two"], "argument --threads: 'two'; allowed: different numbers from 1"),
        (["--threads", "1,1"], "argument --threads: '1,1'; allowed: different numbers from 1"),
        (["--runs", "0"], "argument --runs: 0; allowed: 1 or more"),
        (["--runs", "few"], "argument --runs: invalid int value: 'few'"),
        (["--window", "0.3"], "argument --window: 0.3; these bundles hear 0.4 to 3 s"),
        (["--window", "nan"], "argument --window: nan; these bundles hear 0.4 to 3 s"),
        (["--window", "3.5"], "argument --window: 3.5; these bundles hear 0.4 to 3 s"),
        (["--weights", "none"], "argument --weights: 'none' is not there"),
        (["--json", "no/r.json"], "argument --json: 'no/r.json': make its folder first"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(SystemExit) as stopped:
        main(["latency", "--bundles", str(bundle), *arguments])
    assert (stopped.value.code, capsys.readouterr()) == (2, ("", f"benchmarks: {line}\n"))


def test_a_bundle_that_is_not_there_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["latency", "--bundles", str(tmp_path / "none")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks: argument --bundles: no bundle '{tmp_path / 'none'}'; ")


def test_help_teaches_by_examples():
    command = [sys.executable, "-m", "benchmarks", "latency", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks latency --weights WEIGHTS" in done.stdout
