"""What of `jetson/` shows without a board: the commands of its README, the linters, the unit."""

import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JETSON = ROOT / "jetson"
README = (JETSON / "README.md").read_text(encoding="utf-8")
ANYWHERE, NOT_HERE = "# runs on any machine", "# not run here"
# The linters and Python are those of the environment that runs the tests.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

linux_on_x86 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the linters of the extra [dev] are for Linux on x86",
)
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


def run(*command, path=PATH, **how):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    how["env"] = env | {"PATH": path, **how.get("env", {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **how)


# README.md


def blocks(mark):
    found = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for block in found if block.startswith(f"{mark}\n")]


INSTALL, *OTHERS = blocks(ANYWHERE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, in which the commands may write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("edge_ser", "benchmarks", "jetson"):
        skip = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(checkout):
    done = run("bash", "-euo", "pipefail", "-c", INSTALL, cwd=checkout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_says_whether_it_is_run():
    assert len(blocks(ANYWHERE)) + len(blocks(NOT_HERE)) == README.count("\n```sh\n")


def test_the_first_emotion_without_a_gpu(installed):
    assert len(re.findall(r"\.\w+ +\w+ +\d+\.\d%", installed)) == 3  # the samples
    assert re.search(r"^ok +self-test int8 ", installed, re.MULTILINE)
    assert re.search(r"^end_to_end +\d", installed, re.MULTILINE)


@linux_on_x86
@needs_systemd
@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.splitlines()[1][:30])
def test_a_block_that_runs_on_any_machine(block, checkout, request):
    if "hadolint" not in block:
        request.getfixturevalue("installed")
    path = f"{checkout / '.venv/bin'}:{PATH}"
    if "edge-ser listen" in block and run("edge-ser", "listen", "-h", path=path).returncode:
        pytest.skip("there is no `edge-ser listen` yet")
    done = run("bash", "-euo", "pipefail", "-c", block, path=path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    if "here.json" in block:
        found = json.loads((checkout / "here.json").read_text())
        assert found["machine"]["power_mode"] is found["versions"]["tensorrt"] is None
        gpu, *_, one, every, full, _ = found["cells"]
        assert gpu["error"].startswith("edge-ser: TensorRT is not installed: on a Jetson it comes")
        assert full["error"].startswith("edge-ser: bundle ")
        for cell in (one, every):
            assert cell["bench"]["end_to_end"]["p90_early_stopping_ms"] > 0
            assert cell["energy"].keys() & {"joules", "error"}
    if "pip download" in block:
        wheels = {file.name.split("-")[0] for file in (checkout / "wheels").iterdir()}
        assert {"edge_ser", "onnxruntime", "cuda_bindings", "numpy", "soundfile", "soxr"} <= wheels
    if "listen" in block:
        assert {"label", "confidence"} <= json.loads(done.stdout.splitlines()[0]).keys()
    if "hadolint" in block:
        assert done.stdout == done.stderr == ""


def test_every_error_that_it_explains_is_one_of_ours():
    """Each is a string of the sources, or an f-string, whose parts are names, values or such."""
    patterns = []
    for file in (ROOT / "edge_ser").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(part, "value", "") for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) > 10:
                patterns.append(
                    "".join(
                        re.escape(text.replace("`", "")) if isinstance(text, str) else "(.+?)"
                        for text in texts
                    )
                )

    def ours(text):
        found = (re.fullmatch(pattern, text) for pattern in patterns)
        return any(
            all(" " not in part or part[0] == "'" or ours(part) for part in match.groups())
            for match in found
            if match
        )

    table = README.partition("## When it does not work")[2]
    errors = re.findall(r"^\| `([^|]+)` \|", table, re.MULTILINE)
    assert len(errors) == 11
    assert [error for error in errors if not ours(error)] == []
    assert not ours("CUDA: cudaErrorNoDevice in cudaGetDeviceCount: there is none; buy one")


# Linters: each finds what is wrong in a copy with one fault.

FAULTS = {
    "Dockerfile": (["hadolint"], "FROM ${BASE_IMAGE}", "FROM ubuntu", "DL3006"),
    "bench.sh": (["shellcheck"], '"${edge_ser[@]}" "$@"', "$edge_ser $@", "SC2128"),
    "edge-ser.service": (
        ["systemd-analyze", "verify", "--recursive-errors=no"],
        "WatchdogSec=", "WatchdogSecs=", "Unknown key",
    ),
}  # fmt: skip


@linux_on_x86
@needs_systemd
@pytest.mark.parametrize("name", FAULTS)
def test_the_linters_find_a_fault(name, tmp_path):
    command, right, wrong, said = FAULTS[name]
    text = (JETSON / name).read_text()
    assert text.count(right) == 1
    (tmp_path / name).write_text(text.replace(right, wrong))
    done = run(*command, tmp_path / name)
    assert said in done.stdout + done.stderr
    if name != "edge-ser.service":  # an unknown key is a warning; the block wants no output at all
        assert done.returncode == 1


# The service


def unit(key):
    """Return the values of a key of the unit."""
    text = re.sub(r"\\\n\s*", "", (JETSON / "edge-ser.service").read_text())
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize(("fails", "status"), [(False, 0), (True, 3)])
def test_the_pipe_of_the_unit(fails, status, tmp_path):
    """With an arecord and a listener that are played; systemd itself expands no setting."""
    (command,) = unit("ExecStart")
    command = command.replace("/opt/edge-ser/bin/edge-ser", str(tmp_path / "edge-ser"))
    words = [word.replace("$$", "$") for word in shlex.split(command)]
    (tmp_path / "arecord").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >"{tmp_path}/asked"\nprintf sound\nexit {3 * fails}\n'
    )
    (tmp_path / "edge-ser").write_text('#!/bin/bash\nprintf "%s\\n" "$@"; cat\n')
    for name in ("arecord", "edge-ser"):
        (tmp_path / name).chmod(0o755)
    settings = {"EDGE_SER_MIC": "plughw:CARD=A B", "EDGE_SER_OPTIONS": "--bundle=tiny --threads=1"}
    done = run(*words, path=f"{tmp_path}:{PATH}", env=settings)
    assert done.returncode == status, done.stderr
    assert done.stdout.split("\n") == [
        "listen", "-", "--json", "--bundle=tiny", "--threads=1", "sound",
    ]  # fmt: skip
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [*"-q -t raw -f S16_LE -r 16000 -c 1 -D".split(), "plughw:CARD=A B"]


def test_the_unit_has_what_a_robot_needs():
    assert (unit("Type"), unit("NotifyAccess")) == (["notify"], ["all"])
    assert int(unit("WatchdogSec")[0]) > 10
    assert unit("Restart") == ["always"]
    assert unit("User") == ["edge-ser"]
    assert set(unit("SupplementaryGroups")[0].split()) == {"audio", "video", "render"}
    assert unit("StateDirectory") == unit("CacheDirectory") == ["edge-ser"]
    assert unit("CacheDirectoryMode") == ["0700"]  # edge_ser refuses engines that others can write
    assert "XDG_CACHE_HOME=%C/edge-ser" in " ".join(unit("Environment"))
    assert unit("PrivateDevices") == unit("DevicePolicy") == unit("ProtectClock") == []


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None or os.geteuid() != 0,
    reason="systemd-sysusers is not there, or must not write",
)
def test_the_user_of_the_unit_is_made(tmp_path):
    (tmp_path / "etc/sysusers.d").mkdir(parents=True)
    shutil.copy(JETSON / "edge-ser.sysusers", tmp_path / "etc/sysusers.d/edge-ser.conf")
    done = run("systemd-sysusers", f"--root={tmp_path}")
    assert done.returncode == 0, done.stderr
    (user,) = (tmp_path / "etc/passwd").read_text().splitlines()
    assert user.split(":")[0] == "edge-ser" and user.endswith("/nologin")
    groups = {row.split(":")[0] for row in (tmp_path / "etc/group").read_text().splitlines()}
    assert groups == {"edge-ser", "render"}


def test_settings_of_the_example_are_those_that_the_unit_reads():
    names = set(re.findall(r"^(\w+)=", (JETSON / "edge-ser.conf").read_text(), re.MULTILINE))
    assert names == set(re.findall(r"\$\$(\w+)", unit("ExecStart")[0]))
