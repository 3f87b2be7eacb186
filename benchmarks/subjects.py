"""What is measured where nothing is given: networks of known sizes, and sounds like speech."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser import audio

RATE_HZ = 16_000
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "xlsr": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "do_stable_layer_norm": True, "feat_extract_norm": "layer",
        "conv_bias": True,
    },
}  # fmt: skip
"""What differs from wav2vec2-base (95 million parameters), by name; XLSR-53 has 315 million."""

Samples = NDArray[np.float32]


def save_random(size: str, folder: Path) -> None:
    """Save a classifier of seven labels with seeded random weights, as transformers saves one.

    Args:
        size: One of `SIZES`.
        folder: Takes the checkpoint.
    """
    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForSequenceClassification,
    )

    torch.manual_seed(0)
    config = Wav2Vec2Config(num_labels=7, **SIZES[size])
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def synthetic_speech(count: int, seconds: float, seed: int) -> list[Samples]:
    """Return sounds like speech: harmonics of a pitch around a resonance, four syllables a second.

    Returns:
        float32 of shape (T,) at 16 kHz each, with pitch, resonance and level of its own.
    """
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    made = []
    for _ in range(count):
        pitch_hz, resonance_hz = rng.uniform(90, 250), rng.uniform(400, 3500)
        harmonics_hz = pitch_hz * np.arange(1, int(7000 / pitch_hz))
        phases = 6 * rng.random(len(harmonics_hz))
        samples = np.zeros(len(time_s))
        for frequency_hz, phase in zip(harmonics_hz, phases, strict=True):
            loudness = np.exp(-4 * np.log2(frequency_hz / resonance_hz) ** 2)
            samples += loudness * np.sin(2 * np.pi * frequency_hz * time_s + phase)
        samples *= 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s + phases[0])
        samples *= rng.uniform(0.05, 0.5) / np.abs(samples).max()
        made.append((samples + 1e-3 * rng.standard_normal(len(samples))).astype(np.float32))
    return made


def read_windows(files: Sequence[Path], seconds: float) -> list[Samples]:
    """Return the beginning of each clip, a shorter one repeated: float32 (T,) at 16 kHz.

    Raises:
        AudioError: A file is not one that the runtime takes.
    """
    length = round(seconds * RATE_HZ)
    return [np.resize(audio.read(file, rate_hz=RATE_HZ), length) for file in files]
