import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.encoders import load_encoder
from export.encoders.wav import RATE, STRIDES, WavEncoder
from export.recipe import EncoderChoice

SHORTEST, LONGEST = 6400, 64000  # samples: what the runtime gives to a graph


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return WavEncoder(32, 2).eval()


def test_a_frame_is_as_many_samples_as_the_strides_make():
    assert torch.tensor(STRIDES).prod() == RATE == 16000 / WavEncoder.frame_rate_hz


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(SHORTEST, LONGEST))
def test_frames_of_counts_the_frames(samples):
    with torch.no_grad():
        states = WavEncoder(32, 0)(torch.zeros(1, samples))
    assert states.shape == (1, 1, WavEncoder.frames_of(samples), 32)


@pytest.mark.parametrize("level", [1e-2, 1.0, 30.0])
def test_the_level_and_the_offset_are_not_heard(network, level):
    samples = 0.1 * torch.randn(1, 9000)
    heard = network.features(samples)
    torch.testing.assert_close(heard.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(heard.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    changed = network.features(level * samples + 0.3)
    torch.testing.assert_close(changed, heard, atol=0.01, rtol=0)


def test_silence_is_no_division_by_zero(network):
    assert network(torch.zeros(1, 9000)).isfinite().all()


@pytest.mark.parametrize("samples", [6400, 9001, 12800])
def test_what_lies_behind_a_clip_is_not_heard(network, samples):
    features = torch.randn(2, 1, 16000)
    features[0, :, samples:] = 0  # as clips are padded
    lengths = torch.tensor([samples, 16000])
    frames = int(network.frames_of(torch.tensor(samples)))
    with torch.no_grad():
        padded = network.encode(features, lengths)
        alone = network.encode(features[:1, :, :samples])
        blind = network.encode(features)
    assert alone.shape[2] == frames
    torch.testing.assert_close(padded[:1, :, :frames], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1], blind[1], atol=1e-5, rtol=0)
    assert (blind[:1, :, :frames] - alone).abs().max() > 0.01


def test_the_order_of_frames_is_heard(network):
    samples = torch.randn(1, 1, 12800)
    with torch.no_grad():
        forwards = network.encode(samples)
        halves = torch.cat([samples[:, :, 6400:], samples[:, :, :6400]], dim=2)
        swapped = network.encode(halves)
    moved = torch.cat([swapped[:, :, 10:], swapped[:, :, :10]], dim=2)
    assert (forwards - moved).abs().mean() > 0.01


def test_a_recipe_names_it_without_a_checkpoint():
    encoder = load_encoder(EncoderChoice("wav", 1, width=64), None, 1.0)
    assert (encoder.states, encoder.dim) == (1, 64)
    assert len(encoder.layers) == 1
