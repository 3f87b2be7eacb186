import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.recipe import Data, Distill, EncoderChoice, Recipe, Windows
from export.speech import Speech
from export.targets import NONSPEECH, NOT_KNOWN, Targets
from tests.speech_corpus import LABELS, VALIDATION, make_corpora


def recipe(unlabelled, corpora=("ravdess",)):
    data = Data(corpora, LABELS, validation=VALIDATION[:1], calibration_clips=8)
    student = EncoderChoice("mel", 1, "small", width=8)
    distill = Distill("t.toml", 1, unlabelled=unlabelled)
    return Recipe("r", data, Windows(1.0, 0.5), student, distill=distill)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def test_speech_without_labels_lies_behind_the_clips_and_no_test_speaker_is_in_it(corpora):
    heard = Speech(recipe(("nemo", "turev")), corpora)
    assert {clip.corpus for clip in heard.clips} == {"ravdess"}
    speakers = {clip.speaker_key for clip in heard.unlabelled}
    assert speakers == {"nemo/A", "nemo/B", "turev/C"}
    count, unknown = len(heard.clips), len(heard.unlabelled)
    assert unknown == 6 + 6 + 4
    assert heard.where(heard.unlabelled) == list(range(count, count + unknown))
    assert heard.sounds(3) == range(count + unknown, count + unknown + 3)
    assert heard.views(5)[count:] == [5] * unknown
    targets = Targets.of(heard, 3)
    assert targets.label[count:].tolist() == [NOT_KNOWN] * unknown + [NONSPEECH] * 3
    assert targets.mask.shape == (count + unknown + 3, 3)
    assert targets.mask[count:].all()
    assert len(set(targets.group[[0, count, count + unknown]].tolist())) == 3


def test_without_such_corpora_nothing_is_added(corpora):
    heard = Speech(recipe(()), corpora)
    assert heard.unlabelled == ()
    assert heard.sounds(2) == range(len(heard.clips), len(heard.clips) + 2)
    assert heard.key != Speech(recipe(("nemo",)), corpora).key


def test_a_corpus_is_heard_with_its_labels_or_without():
    with pytest.raises(RecipeError, match=r"distill.unlabelled has \['nemo'\], which data.corpora"):
        recipe(("nemo",), corpora=("ravdess", "nemo"))


def test_labels_that_are_not_known_weigh_nothing(corpora):
    from export.distill import label_weights

    heard = Speech(recipe(("nemo",)), corpora)
    targets = Targets.of(heard, 2)
    chosen = range(len(targets.label))
    weights = label_weights(targets, chosen, 0.5)
    unknown = np.isin(chosen, heard.where(heard.unlabelled))
    assert (weights[unknown] == 0).all()
    known = torch.from_numpy(~unknown)
    assert (weights[known] > 0).all()
    assert weights[known].mean() == pytest.approx(1)
