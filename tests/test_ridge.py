import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from export.errors import CorpusError
from export.heads import CnnHead, statistics
from export.ridge import SHARPEST, add_ridge, solve
from export.splits import folds
from export.targets import NONSPEECH, Targets
from export.views import View
from tests.test_splits import clip


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(3, 20),
    columns=st.integers(1, 12),
    alpha=st.sampled_from([0.1, 3.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_the_closed_form_is_that_of_scikit_learn(rows, columns, alpha, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, columns)) * rng.uniform(0.1, 9, columns) + 5
    target = rng.standard_normal((rows, 3))
    weights = rng.uniform(0.2, 3, rows)
    scaler = StandardScaler()
    model = Ridge(alpha).fit(scaler.fit_transform(inputs), target, weights)
    asked = rng.standard_normal((4, columns))
    weight, bias = solve(*map(torch.from_numpy, (inputs, target, weights)), alpha)
    found = asked @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(found, model.predict(scaler.transform(asked)), atol=1e-7)


def toy(speakers=6, noise=1.0):
    """Return a head, views whose mean tells the label, their clips and their targets."""
    rng = np.random.default_rng(0)
    views, clips = [], []
    for number in range(24):
        states = rng.standard_normal((2, 12, 8)).astype(np.float32) * noise
        states[:, :, number % 3] += 1
        views.append(View(number, 0, {"states": states.astype(np.float16)}))
        clips.append(clip("ravdess", f"s{number // 3 % speakers}", number=number))
    label = torch.arange(24) % 3
    torch.manual_seed(0)
    head = CnnHead(2, 8, 3, width=4).eval()
    return head, views, clips, Targets(label, torch.ones(24, 3, dtype=torch.bool), group=label)


def seen(states):
    """Return the statistics of each normalised state, one behind the other."""
    normed = torch.nn.functional.layer_norm(states, (8,))
    each = [statistics(normed[:, number]) for number in range(states.shape[1])]
    return torch.cat([torch.nn.functional.layer_norm(one, (16,)) for one in each], dim=1)


def answers(head, views):
    states = [torch.from_numpy(view.arrays["states"]).float()[None] for view in views]
    with torch.no_grad():
        return (
            torch.cat([head(one)[0] for one in states]),
            torch.cat([seen(one) for one in states]),
        )


def test_what_is_added_is_the_ridge_regression_times_the_factor():
    head, views, clips, targets = toy()
    before, inputs = answers(head, views)
    chosen = range(18)
    factor = add_ridge(head, views, clips, targets, chosen, alpha=5.0, balance=1.0)
    assert 0 < factor < SHARPEST
    one_hot = torch.eye(3)[targets.label[:18]]
    weight, bias = solve(inputs[:18], one_hot, torch.ones(18), 5.0)
    added = answers(head, views)[0] - before
    np.testing.assert_allclose(added, factor * (inputs @ weight.T + bias), atol=1e-5)
    right = (inputs[18:] @ weight.T + bias).argmax(dim=1) == targets.label[18:]
    assert right.float().mean() > 0.8


@pytest.mark.parametrize("copies", [1, 4])
def test_the_augmented_views_of_a_clip_weigh_as_much_as_the_clip(copies):
    head, views, clips, targets = toy()
    rng = np.random.default_rng(3)
    noisy = [
        View(
            view.clip, number + 1, {"states": view.arrays["states"] + rng.normal(0, 1, (2, 12, 8))}
        )
        for view in views[:18]
        for number in range(copies)
    ]
    before, inputs = answers(head, [*views[:18], *noisy])
    factor = add_ridge(head, [*noisy, *views], clips, targets, range(18), alpha=5.0, balance=0.0)
    rows = [*range(18), *np.repeat(range(18), copies)]
    # Together they count as 18 clips, half of it as recorded.
    weights = torch.tensor([0.5] * 18 + [0.5 / copies] * 18 * copies)
    weight, bias = solve(inputs, torch.eye(3)[targets.label[rows]], weights, 5.0)
    added = answers(head, [*views[:18], *noisy])[0] - before
    np.testing.assert_allclose(added, factor * (inputs @ weight.T + bias), atol=1e-4)


def test_it_is_half_as_sharp_as_fits_held_out_speakers_best():
    head, views, clips, targets = toy()
    _, inputs = answers(head, views)
    one_hot, fold = torch.eye(3)[targets.label], folds(clips, 3, 0)
    held_out = torch.zeros(24, 3)
    for out in (torch.from_numpy(fold == number) for number in range(3)):
        weight, bias = solve(inputs[~out], one_hot[~out], torch.ones(24)[~out], 5.0)
        held_out[out] = inputs[out] @ weight.T + bias
    grid = np.arange(0.1, 30, 0.01)
    losses = [log_loss(targets.label, softmax(f * held_out.numpy(), axis=1)) for f in grid]
    factor = add_ridge(head, views, clips, targets, range(24), alpha=5.0, balance=0.0)
    assert factor == pytest.approx(grid[np.argmin(losses)] / 2, abs=0.01)


def test_sounds_are_answered_with_all_labels_alike():
    rng = np.random.default_rng(1)
    head, views, clips, targets = toy(noise=0.3)
    sounds = rng.standard_normal((12, 2, 12, 8)).astype(np.float32) * 0.3
    sounds[..., :3] += rng.uniform(0, 2, (12, 1, 1, 3))  # like one label or another
    heard = [View(24 + n, 0, {"states": s.astype(np.float16)}) for n, s in enumerate(sounds)]
    targets = Targets(
        torch.cat([targets.label, torch.full((12,), NONSPEECH)]),
        torch.ones(36, 3, dtype=torch.bool),
        torch.cat([targets.group, torch.full((12,), 3)]),
    )
    settings = {"alpha": 1.0, "balance": 0.0}
    spread = []
    for chosen in (range(24), range(36)):
        head, *_ = toy()
        before, _ = answers(head, heard)
        # As sharp as it found: only the shape of the answers is compared.
        factor = add_ridge(head, [*heard, *views], clips, targets, chosen, **settings)
        spread.append(((answers(head, heard)[0] - before) / factor).std(dim=1).mean())
    assert spread[1] < spread[0] / 2


def test_answers_are_as_sharp_as_they_are_right_about_other_speakers():
    def factor(noise):
        head, views, clips, targets = toy(noise=noise)
        return add_ridge(head, views, clips, targets, range(24), alpha=5.0, balance=0.0)

    assert factor(0.3) > 2 * factor(2.0)


def test_one_speaker_cannot_be_held_out():
    head, views, clips, targets = toy(speakers=1)
    with pytest.raises(CorpusError, match="folds, allowed are 2 to 1, the number of speakers"):
        add_ridge(head, views, clips, targets, range(24), alpha=5.0, balance=0.0)
