import numpy as np
import pytest

from edge_ser.adaptation import Adaptation
from export import adapt
from export.adapt import fit_adaptation, measure
from export.crossfit import deal, make_adaptation
from export.recipe import Data, EncoderChoice, Recipe, Train, Windows
from export.speech import Speech
from export.targets import Targets
from tests.speech_corpus import LABELS, SPEAKERS, VALIDATION, make_corpora


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
