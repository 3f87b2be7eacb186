import subprocess

import cuda.bindings
import numpy as np
import pytest

import edge_ser
from benchmarks import machine
from tests.fake_gpu import FakeRuntime


def test_the_processor_is_the_model_name_of_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A: fast one @ 3 GHz\n" * 2)
    assert machine.cpu_model(cpuinfo) == "A: fast one @ 3 GHz"


def test_on_arm_the_processor_is_the_board(tmp_path):
    cpuinfo, board = tmp_path / "cpuinfo", tmp_path / "model"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd42\n")
    board.write_bytes(b"NVIDIA Jetson Orin Nano\0")
    assert machine.cpu_model(cpuinfo, board) == "NVIDIA Jetson Orin Nano"


def test_a_processor_without_a_name_is_not_empty(tmp_path):
    assert machine.cpu_model(tmp_path / "none", tmp_path / "none")


def test_the_description_has_what_a_result_must_name():
    described = machine.describe()
    assert list(described) == [
        "cpu", "architecture", "vnni", "cores", "memory_mb", "os", "load_average",
    ]  # fmt: skip
    assert described["memory_mb"] > 100
    assert type(described["vnni"]) is bool


def test_versions_leave_out_what_is_not_installed():
    found = machine.versions(["numpy", "no-such-package"])
    assert list(found) == ["python", "edge_ser", "numpy"]
    assert (found["edge_ser"], found["numpy"]) == (edge_ser.__version__, np.__version__)


@pytest.fixture
def checkout(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    git("init")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath="]
    git(*author, "commit", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_commit_of_a_clean_checkout(checkout):
    (found,) = (checkout / ".git").glob("refs/heads/*")
    assert machine.commit(checkout) == found.read_text()[:12]


def test_the_commit_says_that_files_were_changed(checkout):
    clean = machine.commit(checkout)
    (checkout / "new.py").write_text("")
    assert machine.commit(checkout) == f"{clean}+changes"


def test_outside_a_checkout_the_commit_is_unknown(tmp_path):
    assert machine.commit(tmp_path) == "unknown"


def test_a_gpu_tells_its_name_its_driver_and_of_a_jetson_release_and_power_mode(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cuda.bindings, "runtime", FakeRuntime())
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3\nmore\n")
    for name, line in (("nvidia-smi", "540.4.0"), ("nvpmodel", "NV Power Mode: MAXN")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{line}'\necho 0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.describe_gpu(tmp_path / "release") == {
        "name": "Orin", "compute_capability": "8.7", "cuda": "13.0",
        "release": "# R36 (release), REVISION: 4.3", "driver": "540.4.0",
        "power_mode": "NV Power Mode: MAXN",
    }  # fmt: skip
