"""`edge-ser verify` and `edge-ser build` on the GPU that is not there; see also test_cli.py."""

import json

import numpy as np
import pytest
import soundfile

from edge_ser.cli import main
from edge_ser.errors import AudioError
from edge_ser.verification import read_clips
from tests.test_tensorrt_engine import Machine


@pytest.fixture
def orin(monkeypatch, tmp_path):
    found = Machine(monkeypatch, tmp_path, integrated=True)
    yield found
    assert found.trt.breaches == []
    assert found.gpu.live == {}


@pytest.fixture
def clips(tmp_path):
    """Eight clips of 3 s, two a loudness between calm (below 1/8), lively and loud (above 3/8)."""
    rows = ["path,emotion"]
    for number, (level, emotion) in enumerate(
        [(0.05, "calm"), (0.2, "lively"), (0.3, "lively"), (0.6, "loud")] * 2
    ):
        samples = np.full(48_000, level, np.float32)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16_000, subtype="FLOAT")
        rows.append(f"{number}.wav,{emotion}")
    file = tmp_path / "clips.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


def verify(bundle, *args, status=0):
    assert main(["verify", "--bundle", str(bundle.path), *args, "--json"]) == status


def test_the_self_test_runs_on_engines_of_its_own_lengths(orin, capsys):
    verify(orin.bundle, "--engine", "tensorrt")
    report = json.loads(capsys.readouterr().out)
    assert [check["check"] for check in report["checks"]] == [
        "hashes", "labels int8", "self-test int8", "labels fp32", "self-test fp32",
    ]  # fmt: skip
    assert report["checks"][2]["detail"].startswith("model_int8.onnx is off by ")
    built = sorted(file.stem.split("-", 1)[1] for file in orin.folder.glob("cache/**/*.plan"))
    assert built == ["fp32-1x16000", "fp32-1x8000", "int8-1x16000", "int8-1x8000"]


def test_clips_of_the_user_are_compared(orin, clips, capsys):
    verify(orin.bundle, "--engine", "tensorrt", "--manifest", str(clips))
    gpu, cpu, equal = json.loads(capsys.readouterr().out)["checks"][-3:]
    everything = "unweighted 100.0% over 3 labels, plain 100.0% of 8 clips"
    assert gpu["detail"] == f"{everything} (model_int8.onnx)"
    assert cpu["detail"].startswith(everything) and "on the processor" in cpu["detail"]
    assert equal["ok"] and equal["detail"].startswith(
        "100.0% of 8 clips have the label of the proc"
    )


def test_an_engine_that_answers_otherwise_fails(orin, clips, capsys, monkeypatch):
    from tests import fake_gpu

    def wrong(samples, classes):
        logits = np.arange(classes, dtype=np.float32)
        return logits if 0.1 < np.abs(samples).mean() < 0.25 else -logits

    monkeypatch.setattr(fake_gpu, "expected_logits", wrong)
    verify(orin.bundle, "--engine", "tensorrt", "--manifest", str(clips), status=1)
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if not check["ok"]]
    assert [check["check"] for check in failed] == ["self-test int8", "self-test fp32", "clips"]
    assert failed[-1]["detail"].startswith("25.0% of 8 clips have the label of the processor")
    recall = (1 + 0 + 0) / 3  # all calm clips; of the lively ones none, of the loud ones none
    gpu = next(check for check in report["checks"] if check["check"] == "accuracy")
    assert gpu["detail"].startswith(f"unweighted {recall:.1%} over 3 labels, plain 25.0% of 8")


def test_clips_on_the_processor_alone(orin, clips, capsys):
    verify(orin.bundle, "--manifest", str(clips))
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert last["check"] == "accuracy" and last["detail"].startswith("unweighted 100.0%")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "has no clips; needed is a column 'path'"),
        ("file\na.wav\n", "has no clips; needed is a column 'path'"),
        ("path,emotion\na.wav,joy\n", "emotion 'joy'; allowed: calm, lively"),
        (b"\xff\xfe", "cannot be read"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_manifests_that_are_none(tmp_path, text, line):
    file = tmp_path / "clips.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AudioError, match=line):
        read_clips(file, ("calm", "lively"))


def test_a_manifest_without_emotions(tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text("\ufeffpath,emotion\na.wav,\nb/c.wav,calm\n", encoding="utf-8")
    assert read_clips(file, ("calm",)) == [(tmp_path / "a.wav", ""), (tmp_path / "b/c.wav", "calm")]


def test_build_builds_every_shape_and_then_finds_it(orin, capsys):
    arguments = ["build", "--bundle", str(orin.bundle.path), "--batch", "1,8", "--window", "1,3"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1] for line in lines[::3]] == [
        "1 x 1 s",
        "8 x 1 s",
        "1 x 3 s",
        "8 x 3 s",
    ]
    assert all(line.startswith("  layers: fp16 1") for line in lines[1::3])
    assert all(line.strip().endswith(".plan") for line in lines[2::3])
    assert orin.trt.builds == 4
    assert main([*arguments, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert orin.trt.builds == 4
    assert {(one["batch"], one["window_s"]) for one in found} == {(1, 1), (8, 1), (1, 3), (8, 3)}
    assert {one["device"] for one in found} == {"Orin, tensorrt 10.3.0"}
    assert found[0]["layers"][1] == {
        "name": "conv1 + gelu", "kind": "CaskConvolution", "precision": "int8", "reformat": False,
        "ms": 0.25,
    }  # fmt: skip


def test_predict_and_bench_on_tensorrt(orin, clips, capsys):
    folder, clip = str(orin.bundle.path), str(clips.parent / "3.wav")
    assert main(["predict", "--engine", "tensorrt", "--bundle", folder, clip, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["label"], found["device"]) == ("loud", "Orin, tensorrt 10.3.0")
    assert main(["bench", "--engine", "tensorrt", "--bundle", folder, "--runs", "2"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("model_int8.onnx of b on Orin, tensorrt 10.3.0")
    orin.gpu.live.clear()  # the end of the process frees them


def test_a_list_that_is_none(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--batch", "1,x"])
    assert "argument --batch: 'x'; allowed: a whole number, 1 or more" in capsys.readouterr().err
