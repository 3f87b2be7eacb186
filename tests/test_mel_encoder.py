from pathlib import Path

import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.encoders.mel import MelEncoder, frames_of
from export.frontend import LogMel
from export.model import new_classifier
from export.recipe import read_recipe

SHORTEST, LONGEST = 6400, 64000  # samples: what the runtime gives to a graph
RECIPES = Path(__file__).parents[1] / "export" / "recipes"


def encoder(mels=16, width=12, layers=3):
    torch.manual_seed(0)
    return MelEncoder(mels, width, layers).eval()


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(SHORTEST, LONGEST))
def test_frames_of_counts_the_frames(samples):
    with torch.no_grad():
        states = MelEncoder(4, 4, 0)(torch.zeros(1, samples))
    assert states.shape == (1, 1, frames_of(samples // 160), 4)


def test_there_are_25_frames_a_second():
    assert frames_of(4 * 100) == 4 * MelEncoder.frame_rate_hz


def test_every_band_of_the_features_has_mean_0():
    samples = 0.1 * torch.randn(2, 8000)
    features = encoder().mel(samples)
    assert features.shape == (2, 16, 50)
    log_mel = LogMel(16)(samples).numpy()
    expected = scipy.signal.detrend(log_mel, axis=2, type="constant") / 4
    torch.testing.assert_close(features, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_a_level_or_a_channel_changes_nothing():
    samples = 0.1 * torch.randn(1, 8000)
    torch.testing.assert_close(encoder().mel(samples), encoder().mel(10 * samples))


def test_encoding_is_the_forward_pass():
    network = encoder()
    samples = 0.1 * torch.randn(2, 8000)
    torch.testing.assert_close(network(samples), network.encode(network.mel(samples)))


@pytest.mark.parametrize("frames", [10, 11, 12, 25, 39])
def test_what_lies_behind_the_mask_is_not_heard(frames):
    network = encoder()
    features = torch.randn(2, 16, 160)
    changed = features.clone()
    # A frame at 25 Hz hears six frames of 10 ms to its right through the strided convolutions.
    changed[:, :, 4 * (frames - 1) + 7 :] = 100 * torch.randn(1)
    mask = (torch.arange(40) < frames).expand(2, 1, 40)
    with torch.no_grad():
        before, after = network.encode(features, mask), network.encode(changed, mask)
        torch.testing.assert_close(before[:, :, :frames], after[:, :, :frames], atol=1e-5, rtol=0)
        blind = (network.encode(features) - network.encode(changed))[:, :, :frames]
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


def test_the_student_of_the_tiny_recipe_has_3_2_million_parameters_at_most():
    student = new_classifier(read_recipe(RECIPES / "tiny.toml"), weights=None)
    parameters = sum(p.numel() for p in student.parameters())
    assert 1_000_000 < parameters <= 3_200_000
    logits, embedding = student.eval()(torch.zeros(2, 16000))
    assert logits.shape == (2, 7)
    assert embedding.shape == (2, student.head.embedding_dim)


def test_folded_norms_give_the_same_answer():
    student = new_classifier(read_recipe(RECIPES / "tiny.toml"), weights=None)
    samples = 0.1 * torch.randn(2, 16000)
    student.train()(samples)  # norms that have seen something
    student.eval()
    with torch.no_grad():
        before = student(samples)[0]
        after = student.fold_norms()(samples)[0]
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in student.modules())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
