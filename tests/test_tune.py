import pytest
import torch

from export.encoders.whisper import WhisperEncoder, upper_states
from export.errors import RecipeError
from export.heads import CnnHead
from export.model import Classifier, lift, trained_part
from export.recipe import Data, EncoderChoice, HeadChoice, Recipe, Train, Windows
from export.train import WeightAverage, schedule
from export.tune import TunedHead, pairs, parameter_groups

CONFIG = {
    "num_mel_bins": 8, "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "max_source_positions": 100,
}  # fmt: skip


def recipe(**train):
    return Recipe(
        "r",
        Data(("ravdess",), ("anger", "sadness", "fear")),
        Windows(1.0, 0.5),
        EncoderChoice("whisper", 3, "somewhere", states=3),
        HeadChoice(8, 0.0),
        train=Train(1, **train),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = WhisperEncoder(CONFIG, 3, 1.0, 3).eval()
    return Classifier(encoder, CnnHead(3, 16, 3, width=8).eval())


SAMPLES = torch.randn(2, 12_800, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_lies_below_and_what_is_tuned_are_together_the_network(model):
    tuned = trained_part(recipe(tuned=2), model)
    below = model.encoder.below(SAMPLES, 1)
    assert below.shape == (2, 40, 16)  # 0.8 s at 50 Hz
    for found, expected in zip(tuned(below[:, None]), model(SAMPLES), strict=True):
        torch.testing.assert_close(found, expected)
    lifted = lift(recipe(tuned=2), model)(below[:, None])
    torch.testing.assert_close(lifted, model.encoder(SAMPLES))


def test_without_tuned_layers_the_head_is_all_that_is_trained(model):
    assert trained_part(recipe(), model) is model.head
    states = torch.randn(1, 3, 4, 16)
    assert lift(recipe(), model)(states) is states


@torch.no_grad()
def test_padding_changes_no_answer(model):
    tuned = trained_part(recipe(tuned=2), model)
    states = torch.randn(1, 1, 22, 16, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(states, (0, 0, 0, 13), value=3.0)
    real = torch.zeros(1, 1, 35, dtype=torch.bool)
    real[..., :22] = True
    for found, expected in zip(tuned(padded, real), tuned(states), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [([1, 1, 1, 1], [1, 1]), ([1, 1, 1, 0], [1, 0]), ([1, 1, 1], [1]), ([0, 1, 1, 1, 1], [0, 1])],
)
def test_a_pair_is_real_if_both_frames_are(frames, expected):
    found = pairs(torch.tensor(frames, dtype=torch.bool)[None, None])
    assert found[0, 0].tolist() == [bool(value) for value in expected]


def test_lower_layers_learn_more_slowly_and_later_than_the_head(model):
    settings = recipe(tuned=2, tuned_rate=1e-3, layer_decay=0.5, learning_rate=2e-3, hold=0.4).train
    tuned = trained_part(recipe(tuned=2), model)
    groups = parameter_groups(tuned, settings)
    assert [(g["rate"], g["start"]) for g in groups] == [(2e-3, 0), (1e-3, 0.4), (5e-4, 0.4)]
    assert groups[1]["params"] == list(model.encoder.layers[2].parameters())
    assert groups[2]["params"] == list(model.encoder.layers[1].parameters())
    optimizer = torch.optim.AdamW(groups)
    rates, learns = [], []
    for progress in (0.0, 0.05, 0.39, 0.43, 1.0):
        schedule(optimizer, progress)
        rates.append([g["lr"] for g in optimizer.param_groups])
        learns.append(model.encoder.layers[1].fc1.weight.requires_grad)
    assert learns == [False, False, False, True, True]
    assert rates[1] == [2e-3, 0.0, 0.0]
    assert rates[3][1:] == pytest.approx([1e-3, 5e-4])  # 5 % of what is left
    assert rates[4] == [0.0, 0.0, 0.0]


def test_layers_that_wait_are_averaged_all_the_same(model):
    tuned = trained_part(recipe(tuned=2), model)
    average = WeightAverage(tuned, 0.9)
    assert average.weights.keys() == dict(tuned.named_parameters()).keys()
    schedule(torch.optim.AdamW(parameter_groups(tuned, recipe(tuned=2).train)), 0.0)
    average.update(tuned)
    weight = tuned.layers[0].fc1.weight
    torch.testing.assert_close(average.weights["layers.0.fc1.weight"], weight.detach())


def test_a_stored_part_fills_the_network_that_it_came_from(model):
    fresh = Classifier(WhisperEncoder(CONFIG, 3, 1.0, 3), CnnHead(3, 16, 3, width=8))
    fresh.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n.startswith("encoder.")}, strict=False
    )
    with torch.no_grad():
        model.encoder.layers[2].fc1.weight.add_(1.0)
    part = trained_part(recipe(tuned=2), model)
    assert isinstance(part, TunedHead)
    trained_part(recipe(tuned=2), fresh).load_state_dict(part.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(SAMPLES)[0], model(SAMPLES)[0])


def test_upper_states_are_the_last_ones(model):
    hidden = torch.randn(1, 6, 16)
    layers = model.encoder.layers
    with torch.no_grad():
        three, one = (upper_states(layers, hidden, count) for count in (3, 1))
    assert three.shape == (1, 3, 3, 16)
    torch.testing.assert_close(three[:, 2:], one)


@pytest.mark.parametrize("tuned", [-1, 1, 4])
def test_a_number_of_layers_that_cannot_be_tuned_is_refused(tuned):
    with pytest.raises(RecipeError, match=r"allowed is 0, or 2 to 3"):
        recipe(tuned=tuned)


def test_ridge_and_tuned_layers_exclude_each_other():
    with pytest.raises(RecipeError, match="ridge needs a frozen encoder"):
        recipe(tuned=2, ridge=100.0)
