import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import edge_ser
from edge_ser.cli import main
from edge_ser.samples import sample_paths
from edge_ser.testing import make_bundle

ROOT = Path(edge_ser.__file__).parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "b"
    return str(make_bundle(folder, fp32=True, abstain_below=0.6))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files, one per outcome: sure of "loud", and undecided between two labels."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("loud.wav", np.full(16_000, 0.5), 16_000, subtype="FLOAT")
    soundfile.write("between.wav", np.full(16_000, 0.125), 16_000, subtype="FLOAT")
    return ["loud.wav", "between.wav"]


def run(*args, **options):
    command = [sys.executable, "-m", "edge_ser", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


# predict


def test_predict_prints_aligned_lines_and_says_uncertain(bundle, files, capsys):
    assert main(["predict", *files, "--bundle", bundle]) == 0
    # loud: logits 0, 3, 4; between: logits 0, 0, -2
    assert capsys.readouterr() == (
        "loud.wav     loud     72.1%\nbetween.wav  calm     46.8%  uncertain\n",
        "",
    )


def test_predict_json_is_one_object_a_line(bundle, files, capsys):
    assert main(["predict", *files, "--bundle", bundle, "--json", "--threads", "1"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(first) == [
        "file",
        "label",
        "confidence",
        "uncertain",
        "probs",
        "windows",
        "device",
        "graph",
    ]
    assert (first["file"], first["label"], first["uncertain"]) == ("loud.wav", "loud", False)
    assert list(first["probs"]) == ["calm", "lively", "loud"]
    assert first["windows"] == [
        {
            "start_s": 0.0,
            "end_s": 1.0,
            "label": "loud",
            "confidence": first["confidence"],
            "probs": first["probs"],
        }
    ]
    assert first["device"] == "cpu"
    assert first["graph"].startswith("model_int8")
    assert (second["file"], second["uncertain"]) == ("between.wav", True)


def test_a_refused_file_is_one_line_and_the_others_are_answered(bundle, files, capsys):
    assert main(["predict", "missing.wav", *files, ".", "--bundle", bundle]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == files
    assert err == (
        "edge-ser: 'missing.wav' does not exist; give the path of an audio file\n"
        "edge-ser: '.' is a folder; give the path of an audio file\n"
    )


def test_a_refused_file_in_json_keeps_its_place(bundle, files, capsys):
    assert main(["predict", files[0], "missing.wav", files[1], "--bundle", bundle, "--json"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == ["loud.wav", "missing.wav", "between.wav"]
    error = "'missing.wav' does not exist; give the path of an audio file"
    assert lines[1] == {"file": "missing.wav", "error": error}
    assert err == f"edge-ser: {error}\n"


def test_fp32_runs_the_other_graph(bundle, files, capsys):
    assert main(["predict", files[0], "--bundle", bundle, "--precision", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graph"] == "model.onnx"


def test_the_samples_are_short_mono_clips_at_16_khz():
    assert [path.name for path in sample_paths()] == ["calm.flac", "excited.flac", "low.flac"]
    for info in map(soundfile.info, map(str, sample_paths())):
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert 2 <= info.duration <= 3


def test_predict_sample_works_outside_the_checkout(bundle, tmp_path):
    done = run("predict", "--sample", "--bundle", bundle, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    names = [Path(line.split()[0]).name for line in done.stdout.splitlines()]
    assert names == ["calm.flac", "excited.flac", "low.flac"]


# Failures


@pytest.mark.parametrize("verb", [["predict", "--sample"], ["info"], ["bench"]])
def test_a_bundle_that_is_refused_is_one_line(verb, tmp_path, capsys):
    assert main([*verb, "--bundle", str(tmp_path)]) == 1
    line = f"edge-ser: bundle '{tmp_path}' has no readable metadata.json\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("where", ["clip.wav", "--sample"])
def test_debug_adds_the_traceback(bundle, tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    missing = str(tmp_path) if where == "--sample" else bundle  # the bundle or the file
    assert main(["predict", where, "--bundle", missing, "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1].startswith("edge-ser: ")


WHOLE = "allowed: a whole number, 1 or more"
USAGE = [
    (["predict"], "predict: error: give a FILE, or --sample"),
    (["predict", "a", "--threads", "0"], f"predict: error: argument --threads: '0'; {WHOLE}"),
    (["predict", "a", "--threads", "x"], f"predict: error: argument --threads: 'x'; {WHOLE}"),
    (["bench", "--runs", "0"], f"bench: error: argument --runs: '0'; {WHOLE}"),
    (
        ["bench", "--seconds", "0.3"],
        "bench: error: argument --seconds: '0.3'; allowed: 0.4 or more",
    ),
    (
        ["bench", "--seconds", "inf"],
        "bench: error: argument --seconds: 'inf'; allowed: 0.4 or more",
    ),
    ([], ": error: the following arguments are required: VERB"),
]


@pytest.mark.parametrize(("args", "line"), USAGE, ids=[line for _, line in USAGE])
def test_wrong_usage_exits_2(args, line, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"edge-ser{line if not args else ' ' + line}"


@pytest.mark.parametrize("args", [["--help"], ["predict", "--help"]])
def test_help_teaches_by_examples(args, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 0
    assert "edge-ser predict --sample  " in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"edge-ser {edge_ser.__version__}\n"


def test_a_reader_that_has_enough_is_no_error(bundle):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "edge_ser", "info", "--bundle", bundle]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(bundle):
    command = [sys.executable, "-m", "edge_ser", "info", "--bundle", bundle]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE)
    line = b"edge-ser: the output cannot be written (No space left on device); send it elsewhere\n"
    assert (done.returncode, done.stderr) == (1, line)


# info, verify, bench


def test_info(bundle, capsys):
    assert main(["info", "--bundle", bundle]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:8] == [
        "name       b",
        f"path       {bundle}",
        "labels     calm, lively, loud",
        "rate       16000 Hz",
        "windows    3 s, one every 1.5 s",
        "uncertain  below 60.0%",
        "certified  yes",
        "corpora    none",
    ]
    assert lines[-1].split() == ["file", "selftest.npz", "0.10", "MB"]


def test_a_bundle_that_is_not_certified_says_so(tmp_path, files, capsys):
    folder = str(make_bundle(tmp_path / "mine", certified=False))
    said = "INT8 answers too often otherwise than full precision; see certificate.json"
    assert main(["info", "--bundle", folder]) == 0
    assert f"certified  no: {said}" in capsys.readouterr().out.splitlines()
    for arguments in (["predict", files[0]], ["bench", "--runs", "1"]):
        assert main([*arguments, "--bundle", folder]) == 0
        assert capsys.readouterr().err == f"edge-ser: mine is not certified: {said}\n"


def test_info_json_is_the_metadata_and_the_path(bundle, capsys):
    assert main(["info", "--bundle", bundle, "--json"]) == 0
    metadata = json.loads((Path(bundle) / "metadata.json").read_text())
    assert json.loads(capsys.readouterr().out) == {"path": bundle, **metadata}


def test_verify_prints_a_line_for_each_check(bundle, capsys):
    assert main(["verify", "--bundle", bundle]) == 0
    self_test = r"\S+ is off by \S+ of the largest logit \(allowed: 0\.05\)"
    patterns = [
        rf"ok      hashes          7 files of '{re.escape(bundle)}'",
        r"ok      labels int8     calm, lively, loud",
        rf"ok      self-test int8  {self_test}",
        r"ok      labels fp32     calm, lively, loud",
        rf"ok      self-test fp32  {self_test}",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert all(map(re.fullmatch, patterns, lines))
    assert len(lines) == len(patterns)


def test_verify_json(bundle, capsys):
    assert main(["verify", "--bundle", bundle, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bundle"], report["ok"]) == (bundle, True)
    assert [(check["check"], check["ok"]) for check in report["checks"]] == [
        ("hashes", True),
        ("labels int8", True),
        ("self-test int8", True),
        ("labels fp32", True),
        ("self-test fp32", True),
    ]


def test_verify_of_a_changed_bundle_fails(tmp_path, capsys):
    folder = make_bundle(tmp_path / "b")
    (folder / "README.md").write_text("changed")
    assert main(["verify", "--bundle", str(folder)]) == 1
    path = str(folder / "README.md")
    assert capsys.readouterr() == (
        f"FAILED  hashes          {path!r} was changed: its SHA-256 is not the listed one; "
        "get a complete copy\n",
        "",
    )


@pytest.mark.parametrize("vnni", [True, False])
def test_verify_of_a_bundle_that_computes_something_else_fails(tmp_path, vnni, monkeypatch, capsys):
    monkeypatch.setattr("edge_ser.engines.has_vnni", lambda: vnni)
    folder = make_bundle(tmp_path / "b")
    weights = folder / "model_int8.bin"
    weights.write_bytes(np.array([0, 8, 80], "<f4").tobytes())
    text = (folder / "metadata.json").read_text()
    metadata = json.loads(text)
    listed = metadata["files"]["model_int8.bin"]["sha256"]
    (folder / "metadata.json").write_text(text.replace(listed, edge_ser.bundle.sha256(weights)))
    assert main(["verify", "--bundle", str(folder), "--json"]) == 1
    *passed, failed = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["ok"] for check in passed)
    assert (failed["check"], failed["ok"]) == ("self-test int8", False)


NUMBERS = {
    "p50_ms",
    "p90_ms",
    "p99_ms",
    "p90_early_stopping_ms",
    "p99_early_stopping_ms",
}


def test_bench_json(bundle, capsys):
    args = ["--runs", "64", "--seconds", "4", "--threads", "1", "--json"]
    assert main(["bench", "--bundle", bundle, *args]) == 0
    result = json.loads(capsys.readouterr().out)
    for part in ("end_to_end", "engine"):
        assert result[part].keys() == NUMBERS
        assert 0 < result[part]["p50_ms"] <= result[part]["p90_ms"] <= result[part]["p99_ms"]
        assert result[part]["p90_early_stopping_ms"] == result[part]["p99_ms"]  # the slowest of 64
        assert result[part]["p99_early_stopping_ms"] is None
    assert (result["bundle"], result["device"], result["threads"]) == ("b", "cpu", 1)
    assert (result["seconds"], result["runs"]) == (4, 64)
    graph = Path(bundle) / result["graph"]
    assert result["graph_sha256"] == edge_ser.bundle.sha256(graph)
    assert result["load_ms"] > 0
    assert result["peak_memory_mb"] > 10


def test_bench_prints_a_table(bundle, capsys):
    assert main(["bench", "--bundle", bundle, "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" of b on cpu, threads: all")
    assert lines[1].startswith("3 s of noise, 2 runs; load ")
    assert lines[2].split() == ["ms", "p50", "p90", "p99"]
    assert [line.split()[0] for line in lines[3:]] == ["end_to_end", "engine"]
