import json
import shutil

import numpy as np
import pytest
from scipy.stats import entropy

from edge_ser.bundle import FP32_GRAPH, X86_GRAPH, Metadata
from edge_ser.testing import make_bundle
from export.conditions import changes, of_length, rows, table
from export.corpora import load_corpora, read_samples
from tests.speech_corpus import LABELS, make_corpora

RATE_HZ = 16000
GAINS = (8.0, 9.5)  # of the graph of testing, and of one that differs from it


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    speakers = {"nemo": ("A", "B")}
    root = make_corpora(tmp_path_factory.mktemp("corpora"), speakers, each=2)
    return load_corpora(root, ["nemo"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Its INT8 graph reads other weights than its full-precision one."""
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "b", labels=LABELS, fp32=True)
    shutil.copyfile(folder / FP32_GRAPH, folder / "same.onnx")
    weights = (GAINS[1] * np.arange(len(LABELS), dtype="<f4")).tobytes()
    (weighty,) = [f for f in folder.iterdir() if f.stat().st_size == 4 * len(LABELS)]
    weighty.write_bytes(weights)
    return folder


def metadata(folder):
    return Metadata.from_json(json.loads((folder / "metadata.json").read_text()))


def test_what_is_long_enough_is_its_beginning(clips):
    for clip, samples in of_length(clips, 0.5, RATE_HZ):
        np.testing.assert_array_equal(samples, read_samples(clip, RATE_HZ)[:8000])


def test_what_is_too_short_goes_on_with_the_same_voice(clips):
    found = of_length(clips, 1.3, RATE_HZ)
    assert [clip for clip, _ in found] == list(clips)
    for clip, samples in found:
        own = read_samples(clip, RATE_HZ)
        (other,) = [
            c for c in clips if (c.speaker, c.emotion) == (clip.speaker, clip.emotion) and c != clip
        ]
        expected = np.concatenate([own, read_samples(other, RATE_HZ)])[: len(samples)]
        np.testing.assert_array_equal(samples, expected)
        assert len(samples) == round(1.3 * RATE_HZ)


def test_a_voice_of_whom_there_is_too_little_is_left_out(clips):
    voices = {}
    for clip in clips:
        key = (clip.speaker, clip.emotion)
        voices[key] = voices.get(key, 0) + len(read_samples(clip, RATE_HZ))
    enough = [c for c in clips if voices[c.speaker, c.emotion] >= 1.8 * RATE_HZ]
    assert 0 < len(enough) < len(clips)
    assert [clip for clip, _ in of_length(clips, 1.8, RATE_HZ)] == enough


def test_level_and_noise_are_what_the_row_says(clips):
    samples = read_samples(clips[0], RATE_HZ)
    made = {name: change(samples, 3) for name, change in changes(RATE_HZ).items()}
    assert list(made) == ["as it is", "-30 dB", "peak 0.99", "noise, 20 dB", "noise, 10 dB"]
    np.testing.assert_array_equal(made["as it is"], samples)
    np.testing.assert_allclose(made["-30 dB"], samples * 10**-1.5, rtol=1e-6)
    assert np.abs(made["peak 0.99"]).max() == pytest.approx(0.99)
    for snr_db in (20, 10):
        noise = made[f"noise, {snr_db} dB"] - samples
        ratio = np.square(samples, dtype=float).mean() / np.square(noise, dtype=float).mean()
        assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.01)


def test_rows_say_how_far_the_graphs_are_apart(bundle, clips):
    found = rows(metadata(bundle), bundle / FP32_GRAPH, bundle / X86_GRAPH, clips)
    by_name = {row["condition"]: row for row in found}
    assert list(by_name) == [
        "1 s", "as it is", "-30 dB", "peak 0.99", "noise, 20 dB", "noise, 10 dB"
    ]  # fmt: skip
    # By hand: the logits are i * gain * mean|x| - i^2.
    level = 0.99
    i = np.arange(len(LABELS))
    answers, apart, right = [[], []], [], [[], []]
    for clip in clips:
        samples = read_samples(clip, RATE_HZ)
        mean = np.abs(samples * np.float32(level / np.abs(samples).max())).mean()
        probs = [np.exp(i * gain * mean - i**2) for gain in GAINS]
        probs = [p / p.sum() for p in probs]
        apart.append(entropy(*probs))
        for side, p in enumerate(probs):
            answers[side].append(p.argmax())
            right[side].append(LABELS[p.argmax()] == clip.emotion)
    row = by_name["peak 0.99"]
    assert row["clips"] == len(clips)
    assert row["labels_equal"] == np.mean(np.array(answers[0]) == np.array(answers[1]))
    assert row["kl"] == pytest.approx(np.mean(apart), rel=1e-4)
    emotions = np.array([clip.emotion for clip in clips])
    for side, graph in enumerate(("fp32", "int8")):
        recalls = [np.array(right[side])[emotions == label].mean() for label in LABELS]
        assert row["ua"][graph] == pytest.approx(np.mean(recalls))


def test_equal_graphs_have_nothing_between_them(bundle, clips):
    found = rows(metadata(bundle), bundle / FP32_GRAPH, bundle / "same.onnx", clips, labelled=False)
    assert {row["labels_equal"] for row in found} == {1.0}
    assert max(abs(row["kl"]) for row in found) < 1e-9
    assert all("ua" not in row for row in found)
    lines = table(found).splitlines()
    assert lines[2].startswith("| 1 s | ")
    assert lines[-1] == f"| noise, 10 dB | {len(clips)} | 100.0% | 0.0e+00 |  |  |"


def test_no_more_clips_are_heard_than_a_row_needs(bundle, clips, monkeypatch):
    monkeypatch.setattr("export.conditions.MOST", 5)
    found = rows(metadata(bundle), bundle / FP32_GRAPH, bundle / "same.onnx", clips)
    assert max(row["clips"] for row in found) == 5
