import pytest
import torch

from export.encoders import load_encoder
from export.encoders.narrow import narrow
from export.encoders.whisper import WhisperEncoder, load_whisper
from export.errors import RecipeError
from export.recipe import EncoderChoice
from tests.speech_corpus import make_whisper


@pytest.fixture
def encoder(tmp_path):
    make_whisper(tmp_path / "four", encoder_attention_heads=4)
    return load_whisper(str(tmp_path / "four"), 2, 1.0, 2)


def answers(encoder: WhisperEncoder):
    samples = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return encoder(samples)


def test_cut_layers_answer_as_whole_ones_where_the_rest_passed_nothing(encoder):
    with torch.no_grad():
        for layer in encoder.layers:
            layer.self_attn.out_proj.weight[:, 8:16] = 0
            layer.self_attn.v_proj.weight[24:32] = 0
            layer.self_attn.v_proj.bias[24:32] = 0
            layer.fc2.weight[:, ::2] = 0
    before = answers(encoder)
    torch.testing.assert_close(answers(narrow(encoder, 2, 32)), before, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in encoder.layers.parameters()) < 0.6 * 2 * 8500


def test_zero_keeps_all(encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    narrow(encoder, 0, 0)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("heads", "units", "name"), [(5, 0, "heads"), (0, 65, "feed_forward")])
def test_more_than_there_is_is_refused(encoder, heads, units, name):
    with pytest.raises(RecipeError, match=rf"encoder\.{name} = \d+: this encoder has"):
        narrow(encoder, heads, units)


def test_a_recipe_narrows_its_encoder(tmp_path):
    make_whisper(tmp_path / "small")
    choice = EncoderChoice("whisper", 1, "small", states=2, heads=1, feed_forward=16)
    layer = load_encoder(choice, tmp_path, 1.0).layers[0]
    assert (layer.self_attn.heads, layer.fc1.out_features) == (1, 16)
