import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import edge_ser
from edge_ser import AudioError, Recognizer
from edge_ser.live import listen, pcm_blocks
from edge_ser.samples import sample_paths
from edge_ser.service import notify
from edge_ser.testing import make_bundle

ROOT = Path(edge_ser.__file__).parent.parent
RATE = 16_000


class Trickle:
    """A pipe whose reader gets these pieces one by one."""

    def __init__(self, *pieces):
        self.pieces = [*pieces, b""]

    def read(self, size):
        return self.pieces.pop(0)


def test_samples_of_a_pipe_are_what_they_are_in_a_file(tmp_path):
    values = np.array([0, 1, -1, 32767, -32768], np.int16)
    soundfile.write(tmp_path / "a.wav", values, RATE, subtype="PCM_16")
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    raw = values.tobytes()
    for pieces in ([raw], [raw[:3], raw[3:]], [bytes([one]) for one in raw]):
        found = np.concatenate(list(pcm_blocks(Trickle(*pieces))))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_a_stream_without_read1_serves():
    assert [len(block) for block in pcm_blocks(io.BytesIO(bytes(10_000)))] == [2048, 2048, 904]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"RIFF1234", "the audio begins with b'RIFF', as a file does; needed is signed 16-bit"),
        (b"fLaC", "the audio begins with b'fLaC', as a file does; needed is signed 16-bit"),
        (bytes(7), "the audio ended within a sample; needed is signed 16-bit little-endian PCM"),
    ],
)
def test_what_is_no_raw_audio_is_refused(raw, line):
    with pytest.raises(AudioError) as error:
        list(pcm_blocks(io.BytesIO(raw)))
    assert str(error.value).startswith(line)


# systemd


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """A socket as systemd has it; it returns what it was told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def told():
            found = []
            while True:
                try:
                    found.append(receiver.recv(64).decode())
                except BlockingIOError:
                    return found

        yield told


def test_systemd_is_told_when_it_is_ready_of_every_answer_and_of_the_end(tmp_path, systemd):
    recognizer = Recognizer.load(make_bundle(tmp_path / "b"), threads=1)
    seen = []
    for event, latency_ms in listen(recognizer, io.BytesIO(bytes(2 * 5 * RATE))):
        assert latency_ms >= 0
        seen.append((event.start_s, event.end_s, systemd()))
    assert seen == [
        (0, 3, ["READY=1", "WATCHDOG=1"]),
        (1.5, 4.5, ["WATCHDOG=1"]),
        (3, 5, ["STOPPING=1"]),
    ]


def test_an_abstract_socket_is_told_too(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0edge_ser_test")
        monkeypatch.setenv("NOTIFY_SOCKET", "@edge_ser_test")
        notify("READY=1")
        assert receiver.recv(64) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all"])
def test_where_nobody_listens_nothing_happens(address, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_a_microphone_that_stops_stops_the_watchdog(tmp_path, systemd):
    """Nothing is told between two answers, so systemd sees a stalled microphone."""
    recognizer = Recognizer.load(make_bundle(tmp_path / "b"), threads=1)
    answers = listen(recognizer, Trickle(bytes(2 * 3 * RATE), bytes(2 * RATE)))
    next(answers)
    assert systemd() == ["READY=1", "WATCHDOG=1"]
    next(answers)
    assert systemd() == ["STOPPING=1"]


# The command


def run(*args, raw=b""):
    return subprocess.run(
        [sys.executable, "-m", "edge_ser", "listen", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=raw,
        capture_output=True,
    )


def test_the_command_answers_a_clip_as_predict_does():
    path = sample_paths()[0]
    samples, _ = soundfile.read(path, dtype="int16")
    done = run("-", "--bundle", "tiny", "--json", "--threads", "1", raw=samples.tobytes())
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    windows = Recognizer.load("tiny", threads=1).predict(path).windows
    assert [(e["start_s"], e["end_s"], e["label"], e["probs"]) for e in events] == [
        (w.start_s, w.end_s, w.label, w.probs) for w in windows
    ]
    assert all(event["latency_ms"] > 0 for event in events)


def test_its_lines(tmp_path):
    bundle = str(make_bundle(tmp_path / "b", abstain_below=0.6))
    loud, between = np.full(3 * RATE, 16384, "<i2"), np.full(RATE * 3 // 2, 4096, "<i2")
    done = run("-", "--bundle", bundle, raw=np.concatenate([loud, between]).tobytes())
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert lines == [
        "    0.00 to     3.00 s  loud     72.1%",
        "    1.50 to     4.50 s  lively   54.7%  uncertain",
    ]


@pytest.mark.parametrize(
    ("args", "status", "line"),
    [
        (["clip.wav"], 2, "SOURCE is 'clip.wav'; allowed: - (raw samples on the standard input)"),
        ([], 2, "the following arguments are required: SOURCE"),
        (["-"], 1, "edge-ser: the stream ended after 0.00 s; allowed: 0.4 s or more"),
    ],
)
def test_wrong_uses_have_one_line(args, status, line):
    done = run(*args)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.decode().splitlines()[-1].endswith(line)
    assert b"Traceback" not in done.stderr
