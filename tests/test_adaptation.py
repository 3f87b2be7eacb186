import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

from edge_ser.adaptation import FEATURES, MOST, Adaptation, History, read_history, write_history
from edge_ser.errors import BundleError

LABELS = ("anger", "neutral", "sadness")
UTTERANCES = arrays(
    np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.floats(-9, 9)
)


def heard(utterances):
    history = History.empty(3)
    for logits in utterances:
        history.add(np.array(logits, np.float64))
    return history


@given(UTTERANCES)
def test_features_are_mean_spread_probability_and_count(utterances):
    found = heard(utterances).features()
    centred = utterances - utterances.mean(axis=1, keepdims=True)
    assert found.shape == (3, FEATURES)
    np.testing.assert_allclose(found[:, 0], centred.mean(axis=0) / 3, atol=1e-9)
    np.testing.assert_allclose(found[:, 1], centred.std(axis=0) / 3, atol=1e-6)
    np.testing.assert_allclose(found[:, 2], softmax(utterances, axis=1).mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(found[:, 3], np.log(len(utterances)) / np.log(50))


@given(UTTERANCES, st.floats(-100, 100), st.randoms())
def test_neither_a_level_nor_the_order_of_utterances_matters(utterances, level, random):
    shuffled = list(utterances + level)
    random.shuffle(shuffled)
    np.testing.assert_allclose(heard(shuffled).features(), heard(utterances).features(), atol=1e-6)


def test_old_utterances_fade_and_the_history_does_not_grow():
    history = heard([[3.0, 0.0, -3.0]] * 400 + [[-3.0, 0.0, 3.0]] * 5)
    assert history.count == MOST
    old = (1 - 1 / MOST) ** 5
    np.testing.assert_allclose(history.logits / MOST, np.array([3, 0, -3]) * (2 * old - 1))
    assert history.probs.sum() == pytest.approx(MOST)


def network(units=4, seed=0, half=3.0):
    rng = np.random.default_rng(seed)
    shapes = ((FEATURES + 1, units), (units + 1, units), (units,))
    return Adaptation(*(rng.normal(size=shape) for shape in shapes), half=half)


def test_the_shift_is_that_of_the_same_network_in_torch():
    import torch

    adaptation, history = network(), heard(np.random.default_rng(1).normal(size=(7, 3)))
    layers = []
    for weights in (adaptation.inner, adaptation.outer):
        layer = torch.nn.Linear(len(weights) - 1, weights.shape[1], dtype=torch.float64)
        layer.weight.data = torch.from_numpy(weights[:-1].T.copy())
        layer.bias.data = torch.from_numpy(weights[-1])
        layers += [layer, torch.nn.Tanh()]
    features = torch.from_numpy(history.features())
    expected = torch.nn.Sequential(*layers)(features).detach().numpy() @ adaptation.last * 7 / 10
    np.testing.assert_allclose(adaptation.shift(history), expected)


def test_nobody_heard_is_no_shift():
    assert network().shift(History.empty(3)).tolist() == [0.0, 0.0, 0.0]


def test_labels_are_treated_alike():
    utterances = np.random.default_rng(2).normal(size=(5, 3))
    swapped = network().shift(heard(utterances[:, [2, 0, 1]]))
    np.testing.assert_allclose(swapped, network().shift(heard(utterances))[[2, 0, 1]])


def test_a_network_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "adaptation.json"
    file.write_text(json.dumps(network().to_json()))
    found = Adaptation.read(file)
    for name in ("inner", "outer", "last", "half"):
        np.testing.assert_array_equal(getattr(found, name), getattr(network(), name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": [[1.0]]}, "allowed: finite numbers"),
        ({"last": [[1.0]]}, "allowed: finite numbers"),
        ({"last": [float("nan")] * 4}, "allowed: finite numbers"),
        ({"last": "x"}, "is not an adaptation"),
        ({"half": 0.0}, "allowed: a number above 0"),
        ({"half": None}, "is not an adaptation"),
        ({"outer": None}, "allowed: finite numbers"),
    ],
)
def test_a_spoilt_network_is_refused_in_one_line(tmp_path, change, message):
    file = tmp_path / "adaptation.json"
    file.write_text(json.dumps({**network().to_json(), **change}))
    with pytest.raises(BundleError, match=message) as error:
        Adaptation.read(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_a_history_is_read_as_it_was_written(tmp_path):
    history = heard(np.random.default_rng(3).normal(size=(4, 3)))
    write_history(history, tmp_path / "anna.json", "abc")
    assert [file.name for file in tmp_path.iterdir()] == ["anna.json"]
    found = read_history(tmp_path / "anna.json", "abc", LABELS)
    assert found.count == 4
    np.testing.assert_array_equal(found.features(), history.features())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no speaker's history"),
        ('{"labels": []}', "no speaker's history"),
        ('{"adaptation": "other", "count": 0}', "made by another model"),
        ('{"adaptation": "abc", "count": 0}', "was changed"),
        ('{"adaptation": "abc", "count": 51, "logits": 3, "squares": 3, "probs": 3}', "changed"),
    ],
)
def test_a_file_that_is_no_history_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "anna.json"
    file.write_text(text)
    with pytest.raises(BundleError, match=message) as error:
        read_history(file, "abc", LABELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [-1, MOST + 1, 1.5, True, None])
def test_a_count_that_cannot_be_is_refused(tmp_path, count):
    file = tmp_path / "anna.json"
    write_history(heard([[1.0, 2.0, 3.0]]), file, "abc")
    document = {**json.loads(file.read_text()), "count": count}
    file.write_text(json.dumps(document))
    with pytest.raises(BundleError, match="was changed"):
        read_history(file, "abc", LABELS)


def test_a_missing_history_is_refused(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        read_history(tmp_path / "nobody.json", "abc", LABELS)
