import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine

from benchmarks.__main__ import main
from benchmarks.match import BATCH, MATCHED, Matching, Teacher, distance, match
from benchmarks.subjects import read_windows
from export.corpora import read_manifest
from export.encoders.whisper import load_whisper
from export.finetuned import load_finetuned
from tests.speech_corpus import LABELS, VALIDATION, make_corpora, make_whisper

SIZE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}  # fmt: skip
RECIPE = f"""
name = "small"
[data]
corpora = ["ravdess", "nemo", "turev"]
labels = {json.dumps(LABELS)}
validation = {json.dumps(VALIDATION)}
calibration_clips = 16
[windows]
window_s = 1.0
hop_s = 0.5
[encoder]
family = "whisper"
source = "small"
layers = 1
[train]
epochs = 1
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("match")
    (folder / "small.toml").write_text(RECIPE)
    make_whisper(folder / "weights" / "small", encoder_layers=6)
    return folder / "small.toml", make_corpora(folder / "corpora", each=9), folder / "weights"


@pytest.fixture(scope="module")
def matched(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return match(*places, out, cpu_minutes=0.6, size=SIZE), out


def test_the_distance_is_the_formula_of_the_paper():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 6, 4))
    cosines = [1 - cosine(a[n, f], b[n, f]) for n in range(2) for f in range(5)]
    expected = np.abs(a - b[:, :5]).mean() + np.mean(np.log1p(np.exp(-np.array(cosines))))
    found = distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_thirds_of_both_networks_are_compared(places):
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    teacher = load_whisper(str(places[2] / "small"), 6, 30.0, states=1)
    config = Wav2Vec2Config(**SIZE | {"num_hidden_layers": 12})
    matching = Matching(Wav2Vec2ForSequenceClassification(config), teacher)
    assert (matching.layers, matching.taught) == ([4, 8, 12], [2, 4, 6])


def test_the_teacher_answers_as_transformers_does_with_mean_0_and_variance_1(places):
    from transformers import WhisperModel

    encoder = load_whisper(str(places[2] / "small"), 6, 30.0, states=1)
    windows = [np.random.default_rng(n).normal(0, 0.1, 480_000).astype(np.float32) for n in (0, 1)]
    layers = [2, 4]
    teacher = Teacher(encoder, layers, windows)
    heard = [teacher(torch.from_numpy(window)[None]) for window in windows]
    reference = WhisperModel.from_pretrained(places[2] / "small").encoder.eval()
    with torch.no_grad():
        mel = [encoder.mel(torch.from_numpy(window)[None]) for window in windows]
        exact = [reference((m[..., :3000] + 4) / 4, output_hidden_states=True) for m in mel]
    for place, layer in enumerate(layers):
        frames = torch.cat([states[place][0] for states in heard])
        assert frames.mean(dim=0).abs().max() < 1e-5
        torch.testing.assert_close(frames.std(dim=0), torch.ones(32), atol=1e-5, rtol=0)
        expected = torch.cat([found.hidden_states[layer][0] for found in exact])
        expected = (expected - expected.mean(dim=0)) / expected.std(dim=0)
        torch.testing.assert_close(frames, expected, atol=1e-3, rtol=0)


def test_the_network_comes_nearer_to_its_teacher(matched):
    said, _ = matched
    assert said["windows"] == BATCH * said["steps"] > 0
    assert (said["layers"], said["taught"]) == ([1, 2, 3], [2, 4, 6])
    before, after = (np.array(said[when]["cosine"]) for when in ("before", "after"))
    assert np.abs(before).max() < 0.2
    # How many steps fit into the time depends on the machine, and the layers do not learn alike.
    assert (after > before).all()
    assert (after - before).mean() > 0.1


def test_peers_is_given_a_checkpoint_and_speech_of_validation_speakers(places, matched):
    said, out = matched
    _, labels = load_finetuned(str(out / MATCHED), window_s=1.0, padded=True)
    assert labels == LABELS
    assert json.loads((out / MATCHED / "matching.json").read_text()) == said
    assert {file.name for file in (out / MATCHED).iterdir()} == {
        "config.json", "matching.json", "model.safetensors", "preprocessor_config.json",
        "stage.json",
    }  # fmt: skip
    calibration = read_manifest(out / "speech" / "calibration" / "manifest.csv", ("path",))
    assert calibration
    clips = sorted((out / "speech" / "clips").glob("*.wav"))
    assert {len(window) for window in read_windows(clips, 7.0)} == {112_000}


def test_what_is_made_already_is_not_made_again(places, matched):
    said, out = matched
    before = (out / MATCHED / "model.safetensors").stat().st_mtime_ns
    assert match(*places, out, cpu_minutes=0.6, size=SIZE) == said
    assert (out / MATCHED / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "words", "status", "line"),
    [
        (('family = "whisper"', 'family = "wav2vec2"'), [], 1, "only 'whisper' can be the teacher"),
        (("", ""), ["--cpu-minutes", "0"], 2, "argument --cpu-minutes: 0; allowed: more than 0"),
        (('source = "small"', 'source = "none"'), [], 1, "no checkpoint 'none'"),
    ],
)
def test_what_cannot_be_done_is_one_line(places, tmp_path, capsys, change, words, status, line):
    (tmp_path / "other.toml").write_text(RECIPE.replace(*change))
    folders = ["--corpora", places[1], "--weights", places[2], "--out", tmp_path / "out"]
    argv = ["match", tmp_path / "other.toml", *folders, *words]
    try:
        assert main([str(word) for word in argv]) == status
    except SystemExit as exc:
        assert exc.code == status
    assert line in capsys.readouterr().err
