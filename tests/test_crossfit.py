import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_ser.adaptation import Adaptation
from export import adapt
from export.adapt import fit_adaptation, measure
from export.crossfit import answer_folds, deal, make_adaptation
from export.errors import RecipeError
from export.recipe import Data, EncoderChoice, HeadChoice, Recipe, Train, Windows
from export.run import features_of
from export.speech import Speech
from export.targets import Targets
from export.train import fit_head
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
    fold = deal(heard)
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
    clips, fold = (*heard.split.train, *heard.split.validation), deal(heard)
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


def test_every_part_begins_with_the_head_of_its_own_teacher(corpora, tmp_path):
    make_whisper(tmp_path / "weights" / "small", seconds=2)
    still = {"learning_rate": 0.0, "tuned_rate": 0.0, "views": 0, "folds": 2}
    encoder = EncoderChoice("whisper", 2, "small", states=2)
    data = Data(tuple(SPEAKERS), LABELS, validation=VALIDATION, calibration_clips=8)

    def of(**train):
        settings = Train(1, **still, **train)
        recipe = Recipe("r", data, Windows(1.0, 0.5), encoder, HeadChoice(8), train=settings)
        return Speech(recipe, corpora)

    def answer(heard, name, seed, teachers=()):
        _, make = features_of(heard, tmp_path / "weights")
        features, folder = tmp_path / f"{name}-features", tmp_path / name
        for place in (features, folder):
            place.mkdir()
        make(features)
        clips = (*heard.split.train, *heard.split.validation)
        answer_folds(
            heard, tmp_path / "weights", features, clips, deal(heard), seed, folder,
            whole=True, teachers=teachers,
        )  # fmt: skip
        return {
            part: load_file(folder / part / "model.safetensors")
            for part in ("fold0", "fold1", "whole")
        }

    teacher = answer(of(), "frozen", seed=3)
    # Three random heads that are alike would tell nothing of whose is whose.
    for number, part in enumerate(teacher):
        teacher[part]["classify.bias"] += number
        save_file(teacher[part], tmp_path / "frozen" / part / "model.safetensors")
    taught = answer(of(tuned=1, teacher="t.toml"), "tuned", 5, [tmp_path / "frozen"])
    for part, tensors in taught.items():
        for name, tensor in teacher[part].items():
            assert torch.equal(tensors[f"head.{name}"], tensor), (part, name)


def test_a_teacher_of_another_shape_is_one_line(corpora, tmp_path):
    make_whisper(tmp_path / "weights" / "small", seconds=2)
    encoder = EncoderChoice("whisper", 2, "small", states=2)
    data = Data(tuple(SPEAKERS), LABELS, validation=VALIDATION, calibration_clips=8)
    settings = Train(1, tuned=1, teacher="t.toml")
    recipe = Recipe("r", data, Windows(1.0, 0.5), encoder, HeadChoice(8), train=settings)
    (tmp_path / "other").mkdir()
    save_file({"weights": torch.zeros(5)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(RecipeError, match=r"no teacher '.*' that fits; run its recipe"):
        fit_head(
            Speech(recipe, corpora), tmp_path / "weights", [], [0], 0, tmp_path / "new",
            [tmp_path / "other"],
        )  # fmt: skip
