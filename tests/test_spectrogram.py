import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.frontend import band_edges_hz
from export.spectrogram import hide, warp

MELS = 24
CENTRES_HZ = band_edges_hz(MELS, 16000)[1:-1]


class Fixed:
    """Draws what it is told to."""

    def __init__(self, *logarithms):
        self.logarithms = np.array(logarithms)

    def uniform(self, low, high, count):
        assert (low <= self.logarithms).all()
        assert (self.logarithms <= high).all()
        assert count == len(self.logarithms)
        return self.logarithms


def test_frequencies_are_scaled_by_the_factor():
    # The value of each band is its own frequency, so a warped band tells where it was taken from.
    features = torch.from_numpy(CENTRES_HZ.astype(np.float32))[None, :, None].expand(3, MELS, 2)
    found = warp(features, Fixed(0.0, 0.2, -0.1), 0.25).numpy()
    for clip, factor in zip(found, (1.0, np.exp(0.2), np.exp(-0.1)), strict=True):
        expected = np.clip(factor * CENTRES_HZ, CENTRES_HZ[0], CENTRES_HZ[-1])
        for frame in clip.T:
            np.testing.assert_allclose(frame, expected, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(mels=st.integers(2, 40), frames=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_warp_keeps_the_range_and_what_is_the_same_in_all_bands(mels, frames, seed):
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.standard_normal((4, mels, frames)).astype(np.float32))
    found = warp(features, rng, 0.3)
    assert (found >= features.amin(dim=1, keepdim=True) - 1e-6).all()
    assert (found <= features.amax(dim=1, keepdim=True) + 1e-6).all()
    flat = features[:, :1].expand(4, mels, frames)
    torch.testing.assert_close(warp(flat, rng, 0.3), flat)


def test_every_clip_has_its_own_factor_and_without_warping_nothing_changes():
    features = torch.randn(3, MELS, 5, generator=torch.manual_seed(0))
    rng = np.random.default_rng(0)
    torch.testing.assert_close(warp(features, rng, 0.0), features)
    same = features[:1].expand(3, MELS, 5)
    found = warp(same, rng, 0.2)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    torch.testing.assert_close(same, features[:1].expand(3, MELS, 5))  # not changed in place


@settings(max_examples=50, deadline=None)
@given(
    mels=st.integers(4, 20),
    frames=st.integers(1, 30),
    band=st.integers(0, 4),
    stretch=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_one_band_and_one_stretch_are_hidden_behind_the_mean(mels, frames, band, stretch, seed):
    rng = np.random.default_rng(seed)
    before = torch.from_numpy(rng.standard_normal((3, mels, frames)).astype(np.float32))
    after = hide(before.clone(), rng, band, stretch)
    for old, new in zip(before, after, strict=True):
        changed = old != new
        rows, columns = changed.all(dim=1), changed.all(dim=0)
        assert torch.equal(changed, rows[:, None] | columns)
        assert (new[changed] == old.mean()).all()
        if not rows.all() and not columns.all():
            assert_together(rows, band)
            assert_together(columns, min(stretch, frames))


def assert_together(hidden, most):
    where = hidden.nonzero().flatten().tolist()
    assert len(where) <= most
    assert where == list(range(where[0], where[0] + len(where))) if where else True


def test_every_width_up_to_the_widest_is_hidden():
    rng = np.random.default_rng(0)
    features = torch.arange(400 * 6 * 9, dtype=torch.float32).reshape(400, 6, 9)
    changed = hide(features.clone(), rng, 2, 3) != features
    assert set(changed.all(dim=2).sum(dim=1).tolist()) == {0, 1, 2}
    assert set(changed.all(dim=1).sum(dim=1).tolist()) == {0, 1, 2, 3}
    assert changed.all(dim=2).any(dim=0).all()
    assert changed.all(dim=1).any(dim=0).all()
