import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from export.heads import CnnHead
from export.recipe import Train
from export.targets import Targets, masked_cross_entropy, smoothed
from export.train import (
    CHECKPOINT,
    WeightAverage,
    bucketed,
    mixed,
    one_cycle,
    pad,
    train_head,
    window_logits,
)
from export.views import View


@pytest.mark.parametrize(
    ("progress", "share"),
    [(0.0, 0.02), (0.025, 0.5), (0.05, 1.0), (0.525, 0.5), (1.0, 0.0), (1.5, 0.0)],
)
def test_one_cycle_rises_and_falls(progress, share):
    assert one_cycle(progress) == pytest.approx(share)


@given(st.floats(0.05, 1.0))
def test_one_cycle_falls_as_a_cosine(progress):
    assert one_cycle(progress) == pytest.approx(np.cos((progress - 0.05) / 0.95 * np.pi / 2) ** 2)


def test_smoothing_stays_within_the_labels_of_the_corpus():
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    found = smoothed(torch.tensor([1, 3]), mask, 0.3)
    expected = torch.tensor([[0.1, 0.8, 0.0, 0.1], [0.075, 0.075, 0.075, 0.775]])
    torch.testing.assert_close(found, expected)


def test_masked_cross_entropy_is_that_over_the_labels_there_are():
    logits = torch.randn(6, 5)
    mask = torch.tensor([True, False, True, True, False]).expand(6, 5)
    label = torch.tensor([0, 2, 3, 3, 0, 2])
    found = masked_cross_entropy(logits, smoothed(label, mask, 0.0), mask)
    expected = functional.cross_entropy(logits[:, [0, 2, 3]], torch.tensor([0, 1, 2, 2, 0, 1]))
    torch.testing.assert_close(found, expected)


def test_a_label_that_the_corpus_lacks_gets_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 3 + [[True, True, True]])
    masked_cross_entropy(logits, smoothed(torch.tensor([0, 1, 0, 2]), mask, 0.1), mask).backward()
    assert logits.grad[:3, 2].tolist() == [0.0, 0.0, 0.0]
    assert (logits.grad[:, :2] != 0).all()
    assert logits.grad[3, 2] != 0


def group_targets(group):
    nothing = torch.zeros(len(group), dtype=torch.int64)
    return Targets(nothing, nothing[:, None].bool(), torch.tensor(group))


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0.0, [1, 1, 1, 1, 1, 1]),
        (0.5, np.array([1 / 2, 1 / 2, 1 / 2, 1 / 2, 1, 1]) * 5 / 3),
        (1.0, np.array([1 / 4, 1 / 4, 1 / 4, 1 / 4, 1, 1]) * 5 / 2),
    ],
)
def test_rare_labels_of_a_corpus_weigh_more(balance, expected):
    # Chosen are four clips of group 0 and one of group 1; the last one is not chosen.
    found = group_targets([0, 0, 0, 0, 1, 1]).weights([0, 1, 2, 3, 4], balance)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert found[:5].mean().item() == pytest.approx(1.0)


def test_weights_are_averaged_with_a_decay_that_rises():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.15)
    expected = 1.0
    for weight, decay in ((2.0, 1 / 11), (3.0, 0.15), (5.0, 0.15)):  # 2 / 12 is beyond 0.15
        model.weight.data.fill_(weight)
        average.update(model)
        expected = decay * expected + (1 - decay) * weight
        assert average.weights["weight"].item() == pytest.approx(expected)


def test_the_average_does_not_move_with_the_model():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    before = average.weights["weight"].clone()
    model.weight.data.add_(1.0)
    assert torch.equal(average.weights["weight"], before)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_batches_hold_every_index_once(lengths, batch, seed):
    batches = list(bucketed(np.random.default_rng(seed), np.array(lengths), batch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch
    assert sum(len(one) < batch for one in batches) <= 1


def test_batches_hold_clips_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 100, 640)
    spreads = [np.ptp(lengths[one]) for one in bucketed(np.random.default_rng(1), lengths, 8)]
    assert np.mean(spreads) < 20  # of eight at random it would be about 70


def test_rows_are_mixed_with_others():
    rows, other = torch.randn(4, 2, 3), torch.tensor([2, 0, 1, 3])
    expected = 0.3 * rows + 0.7 * rows[other]
    torch.testing.assert_close(mixed(rows, other, 0.3), expected)


def test_padding_is_marked():
    states = [torch.ones(2, frames, 3) for frames in (4, 1, 3)]
    stacked, real = pad(states)
    assert stacked.shape == (3, 2, 4, 3)
    assert real[:, 0].sum(dim=1).tolist() == [4, 1, 3]
    assert (stacked == real[..., None]).all()


FRAMES = (8, 14)
SETTINGS = Train(epochs=12, batch=8, learning_rate=3e-3, mixup=0.2, average=0.8)


def toy(clips=24, states=2, dim=8):
    """Return views of three separable classes, one augmented view a clip, and the targets."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, states, 1, dim))
    views = []
    for clip in range(clips):
        for number in (0, 1):
            shape = (states, rng.integers(*FRAMES), dim)
            values = centres[clip % 3] + 0.3 * rng.standard_normal(shape)
            views.append(View(clip, number, {"states": values.astype(np.float16)}))
    label = torch.arange(clips) % 3
    return views, Targets(label, torch.ones(clips, 3, dtype=torch.bool), group=label)


def new_head(seed=0):
    torch.manual_seed(seed)
    return CnnHead(2, 8, 3, width=8)


def trained(folder=None, chosen=range(24), seed=0, settings=SETTINGS):
    head = new_head()
    views, targets = toy()
    train_head(head, views, targets, list(chosen), settings, seed=seed, folder=folder)
    return head


def test_a_head_learns_what_is_separable():
    head = trained(chosen=range(12), settings=Train(epochs=40, batch=8, learning_rate=3e-3))
    views, targets = toy()
    logits = window_logits(head, views, range(24))
    assert not head.training
    assert [len(one) for one in logits] == [1] * 24
    assert [one[0].argmax() for one in logits] == targets.label.tolist()


def test_lower_states_are_not_heard_in_training():
    views, targets = toy(states=3)
    heads = []
    for chance in (0, 1):
        torch.manual_seed(0)
        head = CnnHead(3, 8, 3, width=8, upper=2)
        rng = np.random.default_rng(chance)
        for view in views:
            view.arrays["states"][0] = rng.standard_normal(view.arrays["states"][0].shape)
        train_head(head, views, targets, list(range(24)), SETTINGS, seed=0)
        heads.append(head)
    assert equal(*heads)
    found = window_logits(heads[0], views, range(24))
    assert [one[0].argmax() for one in found] == targets.label.tolist()


def test_windows_of_a_clip_are_answered_in_their_order_and_as_recorded():
    head, (views, _) = new_head().eval(), toy(4)
    views.append(View(1, 0, {"states": np.ones((2, 10, 8), np.float16)}))
    found = window_logits(head, views, [3, 1])
    assert [len(one) for one in found] == [1, 2]
    with torch.no_grad():
        expected = head(torch.ones(1, 2, 10, 8))[0]
    np.testing.assert_array_equal(found[1][1], expected[0].numpy())


def equal(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == also and torch.equal(a, b) for (name, a), (also, b) in pairs)


def test_training_depends_on_the_seed_and_on_nothing_else():
    first = trained()
    torch.rand(5)
    np.random.default_rng().random()
    assert equal(first, trained())
    assert not equal(first, trained(seed=1))


@pytest.mark.parametrize("steps", [4, 17])
def test_a_stopped_training_goes_on_to_the_same_weights_bit_for_bit(tmp_path, steps):
    left = iter(range(steps))

    def stop(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    views, targets = toy()
    head = new_head()
    head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train_head(head, views, targets, list(range(24)), SETTINGS, seed=0, folder=tmp_path)
    epochs = steps // 3  # an epoch has three batches
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["epoch"] == epochs - 1
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    assert equal(trained(tmp_path), trained())
    assert equal(trained(tmp_path), trained())  # nothing is left to train


def test_a_checkpoint_holds_tensors_and_numbers_only(tmp_path):
    trained(tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["epoch"] == SETTINGS.epochs - 1
    assert state["steps"] == 3 * SETTINGS.epochs
    assert state["average"].keys() == dict(new_head().named_parameters()).keys()


def test_clips_that_were_not_chosen_are_not_heard():
    views, targets = toy()
    deaf = [view for view in views if view.clip < 12]
    one, other = new_head(), new_head()
    train_head(one, views, targets, list(range(12)), SETTINGS, seed=0)
    train_head(other, deaf, targets, list(range(12)), SETTINGS, seed=0)
    assert equal(one, other)


def test_clean_1_hears_no_augmented_view():
    views, targets = toy()
    settings = Train(epochs=3, batch=8, clean=1.0)
    one, other = new_head(), new_head()
    train_head(one, views, targets, list(range(24)), settings, seed=0)
    spoilt = [
        View(v.clip, v.number, {"states": v.arrays["states"] * (0 if v.number else 1)})
        for v in views
    ]
    train_head(other, spoilt, targets, list(range(24)), settings, seed=0)
    assert equal(one, other)
