"""Augmentation of log-mel features: what another mouth would say, and what is not to be relied on.

Cheaper than to change the waveform, so it is drawn anew for every step of a training.
"""

import numpy as np
import torch
from torch import Tensor

from export.frontend import band_edges_hz


def warp(features: Tensor, rng: np.random.Generator, most: float, rate_hz: int = 16000) -> Tensor:
    """Scale the frequency axis of each clip: vocal tract length perturbation.

    After Jaitly and Hinton (ICML workshop on deep learning for audio, 2013): formants of a shorter
    vocal tract lie higher, all by the same factor.

    Args:
        features: Log-mel ``(N, mels, F)``.
        rng: Draws a factor for each clip, its logarithm uniformly from ``-most`` to ``most``.
        most: Largest logarithm of a factor.
        rate_hz: Sampling rate of the speech.

    Returns:
        New features of the same shape; beyond the outermost band its value is repeated.
    """
    count, mels, _ = features.shape
    centres_hz = band_edges_hz(mels, rate_hz)[1:-1]
    factors = np.exp(rng.uniform(-most, most, count))
    # Where each band of the warped spectrum lies among those of the old one.
    places = np.interp(factors[:, None] * centres_hz, centres_hz, np.arange(mels))  # (N, mels)
    below = np.minimum(places.astype(int), mels - 2)[..., None]
    share = (places[..., None] - below).astype(np.float32)
    bands = np.arange(mels)
    weights = (bands == below) * (1 - share) + (bands == below + 1) * share  # (N, mels, mels)
    return torch.from_numpy(weights.astype(np.float32)) @ features


def hide(features: Tensor, rng: np.random.Generator, mask_mels: int, mask_frames: int) -> Tensor:
    """SpecAugment: hide one band and one stretch of each clip behind the clip's mean.

    Args:
        features: Log-mel ``(N, mels, F)``; changed in place.
        rng: Source of chance.
        mask_mels: Widest band.
        mask_frames: Longest stretch.
    """
    _, mels, frames = features.shape
    for clip in features:
        mean = clip.mean()
        band, stretch = rng.integers(mask_mels + 1), rng.integers(min(mask_frames, frames) + 1)
        low, start = rng.integers(mels - band + 1), rng.integers(frames - stretch + 1)
        clip[low : low + band] = mean
        clip[:, start : start + stretch] = mean
    return features
