import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

from export.heads import AttentivePooling, CnnHead, DilatedBlock, probed, statistics

LONGEST = 24


def head(**settings):
    torch.manual_seed(0)
    made = CnnHead(3, 16, 4, width=8, **settings).eval()
    torch.nn.init.normal_(made.members[0].weights)
    return made


@pytest.mark.parametrize("frames", range(1, LONGEST + 1))
def test_padding_behind_a_mask_changes_nothing(frames):
    network = head()
    states = torch.randn(2, 3, frames, 16)
    padded = 100 * torch.randn(2, 3, LONGEST, 16)
    padded[:, :, :frames] = states
    mask = (torch.arange(LONGEST) < frames).expand(2, 1, LONGEST)
    with torch.no_grad():
        for alone, masked in zip(network(states), network(padded, mask), strict=True):
            torch.testing.assert_close(masked, alone, atol=1e-5, rtol=0)


def test_without_a_mask_the_padding_is_heard():
    network = head()
    states = torch.randn(1, 3, 12, 16)
    with torch.no_grad():
        whole, part = network(states)[0], network(states[:, :, :8])[0]
    assert (whole - part).abs().max() > 1e-3


def constant(pool):
    """Make every frame of a channel score the same, whatever the frames are."""
    torch.nn.init.zeros_(pool.score[2].weight)
    torch.nn.init.normal_(pool.score[2].bias)
    return pool


@pytest.mark.parametrize("real", [1, 5, 9])
def test_equal_scores_pool_to_mean_and_standard_deviation(real):
    frames = torch.randn(2, 6, 9)
    mask = (torch.arange(9) < real).expand(2, 1, 9)
    with torch.no_grad():
        found = constant(AttentivePooling(6))(frames, mask).numpy()
    heard = frames.numpy()[:, :, :real]
    expected = np.concatenate([heard.mean(axis=2), np.sqrt(heard.var(axis=2) + 1e-5)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("real", [1, 4, 9])
def test_statistics_are_mean_and_standard_deviation_of_the_real_frames(real):
    frames = np.random.default_rng(real).standard_normal((2, 9, 6)).astype(np.float32)
    mask = (torch.arange(9) < real).expand(2, 1, 9)
    heard = frames[:, :real]
    expected = np.concatenate([heard.mean(axis=1), np.sqrt(heard.var(axis=1) + 1e-5)], axis=1)
    found = statistics(torch.from_numpy(frames), mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    whole = statistics(torch.from_numpy(heard.copy()))
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)


def test_the_logits_are_those_of_convolutions_and_probe_together():
    network = head()
    states = torch.randn(2, 3, 10, 16)
    with torch.no_grad():
        both, embedding = network(states)
        network.probe.weight.zero_()
        network.probe.bias.zero_()
        torch.testing.assert_close(network(states)[0], network.members[0].classify(embedding))
        assert (both - network(states)[0]).abs().max() > 1e-3


def test_the_probe_sees_each_state_by_itself():
    torch.manual_seed(0)
    states = torch.randn(2, 3, 10, 16)
    real = torch.ones(2, 1, 10, dtype=torch.bool)
    real[1, 0, 6:] = False
    each = [layer_norm(statistics(states[:, number], real), (32,)) for number in range(3)]
    torch.testing.assert_close(probed(states, real), torch.cat(each, dim=1))


def test_what_the_probe_sees_is_dropped_by_itself():
    torch.manual_seed(0)
    network = CnnHead(3, 16, 4, width=8, dropout=0.0, probe_dropout=1.0).train()
    states = torch.randn(2, 3, 10, 16)
    with torch.no_grad():
        logits, embedding = network(states)
        by_convolutions = network.members[0].classify(embedding)
        torch.testing.assert_close(logits, by_convolutions + network.probe.bias)


def test_gradients_see_the_uppermost_states_alone():
    torch.manual_seed(0)
    network = CnnHead(4, 16, 3, width=8, upper=2).train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    for _ in range(3):
        network(torch.randn(2, 4, 10, 16))[0].square().sum().backward()
        optimizer.step()
    seen = torch.randn(2, 4, 10, 16)
    torch.manual_seed(1)
    whole = network(seen)
    torch.manual_seed(1)
    torch.testing.assert_close(network(seen[:, 2:]), whole)
    lower, upper = network.probe.weight.split(2 * 2 * 16, dim=1)
    assert not lower.any()
    assert upper.all()
    network.eval()
    states = torch.randn(2, 4, 10, 16)
    changed = torch.cat([torch.randn(2, 2, 10, 16), states[:, 2:]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network(changed), network(states))
        lower.normal_()  # as ridge regression does
        assert (network(changed)[0] - network(states)[0]).abs().max() > 1e-2


def test_scores_weigh_frames_by_their_softmax():
    pool = AttentivePooling(1, bottleneck=1)
    for weight in pool.parameters():
        torch.nn.init.zeros_(weight)
    pool.score[0].weight.data.fill_(1.0)
    pool.score[2].weight.data.fill_(np.log(3) / np.tanh(1))  # scores of the frames: 0 and ln 3
    with torch.no_grad():
        mean, deviation = pool(torch.tensor([[[0.0, 1.0]]]))[0].tolist()
    assert mean == pytest.approx(3 / 4)
    assert deviation == pytest.approx(np.sqrt(3 / 16 + 1e-5))


def test_a_block_hears_its_neighbours_at_the_dilation_only():
    torch.manual_seed(0)
    block = DilatedBlock(4, dilation=3, dropout=0.0).eval()
    frames = torch.randn(1, 4, 15)
    changed = frames.clone()
    changed[:, :, 7] += torch.randn(4)
    with torch.no_grad():
        moved = (block(changed) - block(frames)).abs().amax(dim=(0, 1)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [4, 7, 10]


def test_states_are_weighted_and_their_scale_is_not():
    network = head()
    states = torch.randn(1, 3, 10, 16)
    with torch.no_grad():
        expected = network(states)[0]
        scales = torch.tensor([1.0, 50.0, 1000.0])[:, None, None]
        torch.testing.assert_close(network(states * scales)[0], expected, atol=1e-4, rtol=1e-4)
        network.members[0].weights[:] = torch.tensor([0.0, 60.0, 0.0])
        network.probe.weight.zero_()
        chosen = network(states)[0]
        states[:, [0, 2]] = torch.randn(1, 2, 10, 16)
        torch.testing.assert_close(network(states)[0], chosen)


def test_the_shapes_are_as_promised():
    logits, embedding = head()(torch.randn(5, 3, 10, 16))
    assert logits.shape == (5, 4)
    assert embedding.shape == (5, 16)
    assert head().embedding_dim == 16


@pytest.mark.parametrize("members", [1, 3])
def test_each_member_of_the_default_head_has_about_half_a_million_parameters(members):
    network = CnnHead(states=5, dim=512, classes=7, members=members)
    parts = {
        "weights": 3,
        "project": 512 * 256 + 256,
        "blocks": 2 * (3 * 256 * 256 + 256 + 2 * 256),
        "pool": 256 * 64 + 64 + 64 * 256 + 256,
        "norm": 2 * 512,
        "classify": 512 * 7 + 7,
    }
    probe = 5 * 2 * 512 * 7 + 7
    total = sum(p.numel() for p in network.parameters())
    assert total == members * sum(parts.values()) + probe
    assert sum(parts.values()) == 563_786


def test_joined_heads_answer_with_the_mean_of_all():
    torch.manual_seed(0)
    heads = [CnnHead(4, 16, 5, width=8, upper=2).eval() for _ in range(3)]
    for one in heads:
        torch.nn.init.normal_(one.members[0].weights)
        torch.nn.init.normal_(one.probe.weight)
    joined = CnnHead(4, 16, 5, width=8, upper=2, members=3).eval()
    joined.join(heads)
    states, real = torch.randn(2, 4, 10, 16), torch.ones(2, 1, 10, dtype=torch.bool)
    real[1, 0, 6:] = False
    with torch.no_grad():
        logits, embedding = joined(states, real)
        each = [one(states, real) for one in heads]
    torch.testing.assert_close(logits, torch.stack([one for one, _ in each]).mean(dim=0))
    assert embedding.shape == (2, joined.embedding_dim) == (2, 48)
    torch.testing.assert_close(embedding[:, 16:32], each[1][1])


def test_the_frames_are_those_that_are_pooled():
    network = head()
    states = torch.randn(2, 3, 10, 16)
    with torch.no_grad():
        convolutions = network.members[0]
        frames = convolutions.frames(layer_norm(states, (16,)))
        pooled = convolutions.norm(convolutions.pool(frames))
        torch.testing.assert_close(pooled, network(states)[1])
    assert frames.shape == (2, 8, 10)
