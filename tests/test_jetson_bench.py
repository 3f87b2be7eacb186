"""bench.sh, run whole on a board that is played, and what puts its result together."""

import csv
import json
import shlex

import numpy as np
import pytest
import soundfile

from edge_ser.testing import make_bundle
from jetson import collect
from tests.test_jetson import JETSON, PATH, ROOT, run
from tests.test_power import LINES

# rbonghi/jetson_stats, issue 381 (AGX Orin)
CLOCKS = """\
SOC family:tegra234  Machine:NVIDIA Orin Jetson-Small Developer Kit
Online CPUs: 0-11
cpu0: Online=1 Governor=schedutil MinFreq=115200 MaxFreq=2201600 CurrentFreq=2112000 IdleStates: \
WFI=1 c7=1
"""
# hordiales/jetson-tx1-dev, SCRIPTS.md (TX1)
LOCKED = """\
cpu0: Gonvernor=interactive MinFreq=1734000 MaxFreq=1734000 CurrentFreq=1734000
GPU MinFreq=998400000 MaxFreq=998400000 CurrentFreq=998400000
EMC MinFreq=12750000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride=1
"""
PLAYED = {
    "nvpmodel": "NV Power Mode: MAXN\n0\n",  # anduril/jetpack-nixos, pull request 460
    "jetson_clocks": CLOCKS,
    "dpkg-query": "6.2.1+b38",  # unslothai/unsloth, issue 3113
    "tegrastats": LINES["agx orin"][0] + "\n",
}
# Python starts with a GPU that is played, and measures energy for a second, not 44.
CUSTOMIZE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if {{"build", "tensorrt", "result"}} & {{*sys.orig_argv}}:
    import cuda.bindings
    from tests.fake_gpu import FakeRuntime, fake_tensorrt
    cuda.bindings.runtime = FakeRuntime(integrated=True)
    sys.modules["tensorrt"] = fake_tensorrt(cuda.bindings.runtime)
if "--energy" in sys.orig_argv:
    from edge_ser import power
    power.measure.__kwdefaults__.update(blocks=2, block_s=0.2)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A bundle that goes by loudness, and four clips of which it knows three."""
    folder = tmp_path_factory.mktemp("clips")
    rows = [(0.02, "calm"), (0.25, "lively"), (0.6, "loud"), (0.6, "calm")]
    with (folder / "clips.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "emotion"])
        for i, (level, emotion) in enumerate(rows):
            soundfile.write(folder / f"clip {i}.wav", np.full(16_000, level), 16_000)
            writer.writerow([f"clip {i}.wav", emotion])
    make_bundle(folder / "bundle", fp32=True)
    return folder


@pytest.fixture(scope="module")
def played(clips, tmp_path_factory):
    """The result of bench.sh on a board that is played."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)
    for name, prints in PLAYED.items():
        (folder / name).write_text(f"#!/bin/bash\nprintf %s {shlex.quote(prints)}\n")
        (folder / name).chmod(0o755)
    (folder / "tegrastats").write_text(
        f"#!/bin/bash\nexec 9<> <(:)  # to wait on, without a process each time\n"
        f"while printf %s {shlex.quote(PLAYED['tegrastats'])}; do read -t 0.02 -u 9; done\n"
    )
    done = run(
        JETSON / "bench.sh", "--out", "result.json", "--bundle", "bundle", "--runs", "2",
        "--manifest", "clips.csv",
        cwd=clips, path=f"{folder}:{PATH}",
        env={"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((clips / "result.json").read_text())


def test_the_result_says_what_board_it_was(played):
    machine = played["machine"]
    assert (machine["power_mode"], machine["power_mode_id"]) == ("MAXN", 0)
    assert machine["clocks_locked"] is False
    assert machine["jetson_clocks"] == CLOCKS.splitlines()
    assert machine["jetpack"] == "6.2.1+b38"
    assert machine["tegrastats_before"] == machine["tegrastats_after"] == LINES["agx orin"][0]
    assert machine["not_read"] == {}
    assert played["versions"]["tensorrt"] == "tensorrt 10.3.0"
    assert played["bundle"]["labels"] == ["calm", "lively", "loud"]
    assert played["schema_version"] == 1


def test_every_precision_of_both_engines_has_a_cell(played):
    asked = [(cell["engine"], cell["precision"], cell["threads"]) for cell in played["cells"]]
    assert asked == [
        ("tensorrt", "int8", None), ("tensorrt", "fp16", None), ("tensorrt", "fp32", None),
        ("onnx", "int8", 1), ("onnx", "int8", None), ("onnx", "fp32", 1), ("onnx", "fp32", None),
    ]  # fmt: skip
    half = played["cells"].pop(1)  # the bundle has none
    assert half["error"].startswith("edge-ser: bundle '")
    assert "has no 'model_fp16.onnx'" in half["error"]
    for cell in played["cells"]:
        gpu = cell["engine"] == "tensorrt"
        assert cell["bench"]["device"] == ("Orin, tensorrt 10.3.0" if gpu else "cpu")
        assert cell["bench"]["graph"] in ("model_int8.onnx", "model_int8_x86.onnx", "model.onnx")
        assert cell["bench"]["runs"] == 2
        assert (cell["build"] is not None) == gpu
        # the rails of LINES["agx orin"]: 4.94, .988 and 4.442 W, all the time
        assert cell["energy"]["meter"] == "tegrastats VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
        assert cell["energy"]["idle_w"] == pytest.approx(10.37, rel=0.02)
        assert cell["energy"]["work_w"] == pytest.approx(10.37, rel=0.02)
        assert cell["memory_taken_mb"] >= 0
        # calm: 1 of 2, lively and loud: 1 of 1
        assert cell["accuracy"] == {
            "clips": 4,
            "refused": 0,
            "ua": pytest.approx(5 / 6),
            "wa": 0.75,
        }
    assert {layer["precision"] for layer in played["cells"][0]["build"]["layers"]} >= {"int8"}
    assert played["verify"]["tensorrt"]["ok"] and played["verify"]["onnx"]["ok"]


def test_clips_that_are_refused_or_have_no_emotion(tmp_path):
    lines = [{"file": "a", "label": "calm"}, {"file": "b", "error": "too short"}]
    (tmp_path / "predict.json").write_text("\n".join(map(json.dumps, lines)))
    emotions = {"a": "calm", "b": "calm", "c": "", "d": "loud"}  # nothing is known of c and d
    found = collect.accuracy(tmp_path, emotions)
    assert found == {"clips": 3, "refused": 3, "ua": 0.25, "wa": pytest.approx(1 / 3)}
    (tmp_path / "predict.json").write_text("")
    (tmp_path / "predict.error").write_text("one\nedge-ser: no\n")
    assert collect.accuracy(tmp_path, emotions) == {"error": "edge-ser: no"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "bench.sh: no --out FILE; it is what you contribute\n"),
        (["--out"], 2, "bench.sh: --out has no value\n"),
        (["--all"], 2, "bench.sh: argument '--all'; allowed: --out, --bundle, --manifest, --runs"),
        (["--out", "none/a.json"], 2, "bench.sh: no folder '"),
        (["--out", "a.json", "--bundle", "none"], 1, "edge-ser: no bundle 'none'; allowed: a fold"),
        (["--out", "a.json", "--manifest", "none"], 1, "bench.sh: manifest '"),
    ],
)
def test_bench_refuses_wrong_arguments(arguments, status, said, tmp_path):
    done = run(JETSON / "bench.sh", *arguments, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_help_of_bench_is_its_head():
    done = run(JETSON / "bench.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Measures edge_ser on this board")
    assert "#" not in done.stdout and "set -euo" not in done.stdout


def test_files_of_the_board_are_read(tmp_path):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    (tmp_path / "etc").mkdir()
    # SnapDragonfly/jetson-fpv, doc/TESTENV.md, has the same release
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    (tmp_path / "usr/local/cuda").mkdir(parents=True)
    (tmp_path / "usr/local/cuda/version.json").write_text(
        '{\n   "cuda" : {\n      "name" : "CUDA SDK",\n      "version" : "12.6.11"\n   },\n'
        '   "cuda_nvcc" : {"name" : "CUDA NVCC", "version" : "12.6.68"}\n}\n'
    )
    found = collect.board(tmp_path, tmp_path)
    assert found == {
        "board": "NVIDIA Jetson Orin Nano", "jetpack": None, "l4t": "36.4.3", "cuda": "12.6.11",
    }  # fmt: skip


@pytest.mark.parametrize(("clocks", "locked"), [(CLOCKS, False), (LOCKED, True), ("", None)])
def test_clocks_are_locked_where_least_is_most(clocks, locked, tmp_path):
    (tmp_path / "jetson_clocks").write_text(clocks)
    assert collect.state(tmp_path)["clocks_locked"] is locked


def test_a_power_mode_that_this_user_must_not_read(tmp_path):
    (tmp_path / "nvpmodel").write_text("")
    (tmp_path / "nvpmodel.error").write_text("sudo: a password is required\n")
    found = collect.state(tmp_path)
    assert found["power_mode"] is None and found["nvpmodel"] == []
    assert found["not_read"] == {"nvpmodel": "sudo: a password is required"}


def test_memory_is_counted_from_the_first_reading(tmp_path):
    (tmp_path / "kb").write_text("5000\n7000\n4000\n6000\n")
    assert collect.memory_taken_mb(tmp_path / "kb") == pytest.approx(1.0, abs=0.05)  # 1000 kB
