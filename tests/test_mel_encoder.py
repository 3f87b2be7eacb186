from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.encoders import load_encoder
from export.encoders.mel import MelEncoder
from export.encoders.whisper import WhisperStem, halved, load_whisper
from export.model import new_classifier
from export.recipe import EncoderChoice
from export.recipe_file import read_recipe
from tests.speech_corpus import make_whisper

SHORTEST, LONGEST = 6400, 64000  # samples: what the runtime gives to a graph
RECIPES = Path(__file__).parents[1] / "export" / "recipes"


def encoder(mels=16, width=12, layers=3):
    torch.manual_seed(0)
    return MelEncoder(WhisperStem(mels, 8), width, layers).eval()


def tiny(weights):
    """Return the student of the shipped recipe behind a small checkpoint."""
    make_whisper(weights / "whisper-base-encoder", d_model=512)
    return new_classifier(read_recipe(RECIPES / "tiny.toml"), weights)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(SHORTEST, LONGEST))
def test_frames_of_counts_the_frames(samples):
    network = MelEncoder(WhisperStem(4, 4), 4, 0)
    with torch.no_grad():
        states = network(torch.zeros(1, samples))
    assert states.shape == (1, 1, network.frames_of(samples // 160), 4)


def test_there_are_25_frames_a_second():
    assert MelEncoder.frames_of(4 * 100) == 4 * MelEncoder.frame_rate_hz


def test_a_student_begins_as_whisper_does(tmp_path):
    make_whisper(tmp_path / "small")
    student = load_encoder(EncoderChoice("mel", 1, "small", width=8), tmp_path, 1.0)
    whisper = load_whisper(str(tmp_path / "small"), 1, 1.0, 2)
    heard = []
    student.even.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    samples = 0.1 * torch.randn(2, 8000)
    with torch.no_grad():
        student(samples)
        expected = whisper(samples)[:, 0] - halved(whisper.embed_positions.weight[None, :25])
    # Whisper's first state has positions added and is halved; the student hears it before.
    torch.testing.assert_close(halved(heard[0].transpose(1, 2)), expected, atol=1e-4, rtol=0)


def test_a_step_of_training_leaves_the_stem_as_it_is():
    network = encoder().train()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(0.1 * torch.randn(2, 8000)).square().mean().backward()
    optimizer.step()
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert "halve.0.weight" in changed
    assert not any(name.startswith("stem.") for name in changed)


def test_encoding_is_the_forward_pass():
    network = encoder()
    samples = 0.1 * torch.randn(2, 8000)
    torch.testing.assert_close(network(samples), network.encode(network.stem.features(samples)))


@pytest.mark.parametrize("frames", [10, 11, 12, 25, 39])
def test_what_lies_behind_the_mask_is_not_heard(frames):
    network = encoder()
    features = torch.randn(2, 16, 160)
    changed = features.clone()
    # A frame at 25 Hz hears four frames of 10 ms to its right through the strided convolutions.
    changed[:, :, 4 * (frames - 1) + 5 :] = 100 * torch.randn(1)
    lengths = torch.tensor([4 * frames, 160])
    changed[1] = features[1]  # of which all is real
    with torch.no_grad():
        before, after = network.encode(features, lengths), network.encode(changed, lengths)
        torch.testing.assert_close(before[:, :, :frames], after[:, :, :frames], atol=1e-5, rtol=0)
        torch.testing.assert_close(before[1], network.encode(features)[1], atol=1e-5, rtol=0)
        blind = (network.encode(features) - network.encode(changed))[:1, :, :frames]
    assert blind.abs().max() > 1e-3  # without the mask, the dilated blocks carry it in


def test_nothing_is_shared_between_the_clips_of_a_batch():
    network = encoder()
    samples = torch.randn(3, 8000) * torch.tensor([[1e-4], [0.1], [3.0]])
    with torch.no_grad():
        batch = network(samples)
        for row in range(3):
            torch.testing.assert_close(
                batch[row : row + 1], network(samples[row : row + 1]), atol=1e-4, rtol=0
            )


def test_the_student_of_the_tiny_recipe_has_3_2_million_parameters_at_most(tmp_path):
    student = tiny(tmp_path)
    parameters = sum(p.numel() for p in student.parameters())
    assert 1_000_000 < parameters <= 3_200_000
    logits, embedding = student.eval()(torch.zeros(2, 16000))
    assert logits.shape == (2, 7)
    assert embedding.shape == (2, student.head.embedding_dim)


def test_folded_norms_give_the_same_answer(tmp_path):
    student = tiny(tmp_path)
    samples = 0.1 * torch.randn(2, 16000)
    student.train()(samples)  # norms that have seen something
    student.eval()
    with torch.no_grad():
        before = student(samples)[0]
        after = student.fold_norms()(samples)[0]
    left = [n for n, m in student.named_modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert left == ["encoder.even"]  # no convolution stands before it
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
