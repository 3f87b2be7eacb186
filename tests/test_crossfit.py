import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edge_ser.adaptation import Adaptation
from export import adapt
from export.adapt import fit_adaptation, measure
from export.crossfit import make_adaptation
from export.model import new_classifier
from export.recipe import Data, EncoderChoice, HeadChoice, Recipe, Train, Windows
from export.ridge import add_ridge
from export.run import features_of
from export.speech import Speech
from export.targets import Targets
from export.train import fit_head, window_logits
from export.views import load_views
from tests.speech_corpus import LABELS, SPEAKERS, VALIDATION, make_corpora, make_whisper


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    speakers = {**SPEAKERS, "ravdess": (*SPEAKERS["ravdess"], "04", "05", "06")}
    return make_corpora(tmp_path_factory.mktemp("corpora"), speakers)


def speech(corpora, folds=4):
    recipe = Recipe(
        "r",
        Data(tuple(SPEAKERS), LABELS, validation=VALIDATION, calibration_clips=8),
        Windows(1.0, 0.5),
        EncoderChoice("whisper", 2, "somewhere"),
        train=Train(1, folds=folds),
    )
    return Speech(recipe, corpora)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_speaker_is_left_out_once_and_the_validation_speakers_first(corpora, count):
    heard = speech(corpora, count)
    clips = (*heard.split.train, *heard.split.validation)
    fold = heard.split.deal(count)
    assert set(fold.tolist()) == set(range(count))
    of_speaker = {}
    for clip, number in zip(clips, fold.tolist(), strict=True):
        of_speaker.setdefault(clip.speaker_key, set()).add(number)
    assert all(len(numbers) == 1 for numbers in of_speaker.values())
    assert {key for key, numbers in of_speaker.items() if numbers == {0}} == set(VALIDATION)


def test_an_adaptation_is_measured_on_speakers_that_it_has_not_heard(
    corpora, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapt, "REPEATS", 1)
    heard = speech(corpora)
    clips, fold = (*heard.split.train, *heard.split.validation), heard.split.deal(4)
    logits = 0.1 * np.random.default_rng(0).normal(size=(len(clips), 3))
    rows = make_adaptation(heard, clips, logits, fold, tmp_path / "adaptation.json")
    targets, places = Targets.of(heard), heard.where(clips)
    labels, mask = targets.label[places].numpy(), targets.mask[places].numpy()
    weights = targets.weights(places, 0.5)[places].double().numpy()

    def fit(chosen):
        among = [clip for clip, use in zip(clips, chosen, strict=True) if use]
        return fit_adaptation(logits[chosen], among, labels[chosen], mask[chosen], weights[chosen])

    shipped = fit(np.ones(len(clips), bool))
    assert Adaptation.read(tmp_path / "adaptation.json").to_json() == shipped.to_json()
    unheard = [fit(fold != number) for number in range(4)]
    expected = measure(logits, [unheard[number] for number in fold], clips, labels, mask, 3)
    assert rows == expected
    assert rows != measure(logits, [shipped] * len(clips), clips, labels, mask, 3)


def trainable(corpora, tmp_path, nonspeech=0):
    """Return settings of a head for so many members, the views, and the clips of train."""
    make_whisper(tmp_path / "weights" / "small", seconds=2)

    def heard(members=1):
        return Speech(
            Recipe(
                "r",
                Data(tuple(SPEAKERS), LABELS, validation=VALIDATION, calibration_clips=8),
                Windows(1.0, 0.5),
                EncoderChoice("whisper", 2, "small", states=3),
                HeadChoice(8, upper=2, members=members),
                train=Train(1, views=1, ridge=10.0, nonspeech=nonspeech),
            ),
            corpora,
        )

    _, make = features_of(heard(), tmp_path / "weights")
    (tmp_path / "features").mkdir()
    make(tmp_path / "features")
    return heard, load_views(tmp_path / "features"), heard().where(heard().split.train)


def test_ridge_regression_hears_the_sounds_and_the_clips_of_training_alone(corpora, tmp_path):
    heard, views, chosen = trainable(corpora, tmp_path, nonspeech=6)
    settings = heard()
    found = fit_head(settings, tmp_path / "weights", views, chosen, 0, tmp_path)
    state = torch.load(tmp_path / "member0" / "checkpoint.pt", weights_only=True)
    targets, sounds = Targets.of(settings, 6), settings.sounds(6)

    def with_ridge(among):
        head = new_classifier(settings.recipe, tmp_path / "weights").head
        head.load_state_dict(state["head"] | state["average"], strict=False)
        ridge = {"alpha": 10.0, "balance": settings.recipe.train.balance}
        add_ridge(head.eval(), views, settings.clips, targets, among, **ridge)
        return head.probe.weight

    expected = with_ridge([*chosen, *sounds])
    torch.testing.assert_close(found.probe.weight, expected, rtol=0, atol=0)
    assert (with_ridge(chosen) - expected).abs().max() > 1e-3


def test_the_members_of_a_head_are_single_heads_of_other_seeds(corpora, tmp_path):
    heard, views, chosen = trainable(corpora, tmp_path)

    def fit(members, seed):
        folder = tmp_path / f"{members}-{seed}"
        return fit_head(heard(members), tmp_path / "weights", views, chosen, seed, folder), folder

    both, folder = fit(2, 3)
    alone = [fit(1, seed)[0] for seed in (6, 7)]
    expected = [torch.tensor(window_logits(one, views, chosen[:2])[0]) for one in alone]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    found = torch.tensor(window_logits(both, views, chosen[:2])[0])
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2)

    # What is finished is not trained again, nor is the ridge added twice.
    kept = folder / "member1" / "checkpoint.pt"
    before = kept.stat().st_mtime_ns
    again, _ = fit(2, 3)
    assert kept.stat().st_mtime_ns == before
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
