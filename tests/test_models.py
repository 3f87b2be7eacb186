import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_ser import Recognizer
from edge_ser.bundle import Bundle
from edge_ser.engines import open_onnx
from edge_ser.samples import sample_paths
from edge_ser.selftest import TOLERANCE, deviation
from export.half import HALVES

SIZES_MB = {"default": 18, "tiny": 4}


@pytest.mark.parametrize("name", SIZES_MB)
def test_an_embedded_bundle_is_whole_small_and_right_on_this_processor(name):
    bundle = Bundle.open(name)
    files = [bundle.path / file for file in bundle.metadata.files]
    assert sum(file.stat().st_size for file in files if file.exists()) <= SIZES_MB[name] * 1e6
    assert not {"model.onnx", *HALVES.values()} & {file.name for file in bundle.path.iterdir()}
    assert deviation(bundle, open_onnx(bundle)) <= TOLERANCE


@pytest.mark.parametrize("name", SIZES_MB)
def test_the_certificate_is_of_these_graphs_and_passed_the_gate(name):
    bundle = Bundle.open(name)
    certificate = json.loads((bundle.path / "certificate.json").read_text())
    for system, gate in certificate["gate"].items():
        scored = certificate["systems"][system]
        assert scored["sha256"] == bundle.metadata.files[scored["graph"]].sha256
        assert gate["passed"]
        assert gate["ua_kept"] >= 0.99
        assert gate["labels_equal"] >= 0.98


def test_the_default_adapts_to_a_speaker_and_doubts_what_is_no_speech():
    recognizer = Recognizer.load("default", threads=1)
    speaker = recognizer.adapt()
    paths = sample_paths()
    assert speaker.predict(paths[0]) == recognizer.predict(paths[0])
    assert speaker.predict(paths[1]).probs != recognizer.predict(paths[1]).probs
    certificate = json.loads((Bundle.open("default").path / "certificate.json").read_text())
    assert certificate["nonspeech"]["uncertain"] >= 0.95
    silence = np.zeros(2 * 16_000, np.float32)
    assert recognizer.predict(silence, 16_000).uncertain
    ua = {(row["history"], row["utterances"]): row["pooled_ua"] for row in certificate["adapted"]}
    assert ua["balanced", 20] > ua["none", 0]


@pytest.mark.parametrize("name", SIZES_MB)
def test_every_sample_is_answered(name):
    recognizer = Recognizer.load(name, threads=1)
    for path in sample_paths():
        prediction = recognizer.predict(path)
        assert prediction.label in recognizer.metadata.labels
        assert sum(prediction.probs.values()) == pytest.approx(1)
        assert prediction.confidence == max(prediction.probs.values())


@pytest.mark.parametrize("name", SIZES_MB)
def test_silence_behind_a_clip_is_heard_only_in_the_windows_that_hold_it(name):
    recognizer = Recognizer.load(name, threads=1)
    rate = recognizer.metadata.sample_rate_hz
    window = round(recognizer.metadata.window_s * rate)
    speech = np.tile(np.random.default_rng(0).normal(0, 0.1, window), 2).astype(np.float32)
    alone = recognizer.predict(speech[:window], rate).windows[0]
    followed = recognizer.predict(np.pad(speech[:window], (0, window)), rate).windows[0]
    assert alone == followed


def test_the_wheel_holds_the_runtime_only_and_predicts_outside_the_checkout(tmp_path):
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 24e6
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(site)
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edge_ser"}
    done = subprocess.run(
        [sys.executable, "-m", "edge_ser", "predict", "--sample", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(answer["file"]).name for answer in answers] == [p.name for p in sample_paths()]
    assert all(answer["file"].startswith(str(site)) for answer in answers)
