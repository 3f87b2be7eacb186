"""A small corpus of synthetic speech and a small Whisper checkpoint, made on disk.

A label is a resonance, a speaker a pitch: what must be learned is there, and not in one frame only.
The speakers are those that the fixed test split needs, and a few more to train on.
"""

import time
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000
RESONANCES_HZ = {"anger": 3500.0, "happiness": 1300.0, "sadness": 450.0}
LABELS = tuple(RESONANCES_HZ)
SPEAKERS = {
    "ravdess": ("16", "17", "18", "19", "01", "02", "03"),
    "nemo": ("IC0", "WR0", "A", "B"),
    "turev": ("1358", "6783", "C"),
}
VALIDATION = ("ravdess/03", "nemo/B")
LACKS = {"turev": "anger"}


def voice(resonance_hz, pitch_hz, seconds, seed):
    """Return harmonics of a pitch around one resonance over a little noise: float32 (T,)."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    harmonics = np.arange(1, int(7000 / pitch_hz))[:, None]
    octaves = np.log2(harmonics * pitch_hz / resonance_hz)
    tones = np.sin(2 * np.pi * harmonics * pitch_hz * time_s + 6 * rng.random(harmonics.shape))
    samples = (np.exp(-8 * octaves**2) * tones).sum(axis=0)
    samples *= 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s)
    samples *= 0.2 / np.abs(samples).max()
    return (samples + 1e-3 * rng.standard_normal(len(samples))).astype(np.float32)


def make_corpora(root, speakers=None, each=2):
    """Write ``<corpus>/manifest.csv`` and WAV files of 0.6 to 1.2 s.

    Args:
        root: Where to write.
        speakers: By corpus; those of `SPEAKERS` without it.
        each: Clips of a label and speaker.

    Returns:
        ``root``.
    """
    number = 0
    for corpus, names in (speakers or SPEAKERS).items():
        folder = Path(root) / corpus
        folder.mkdir(parents=True)
        rows = ["path,emotion,speaker,gender,language,duration_s"]
        for speaker in names:
            for emotion in LABELS * each:
                if emotion == LACKS.get(corpus):
                    continue
                number += 1
                rng = np.random.default_rng(number)
                seconds = round(rng.uniform(0.6, 1.2), 2)
                samples = voice(RESONANCES_HZ[emotion], rng.uniform(90, 220), seconds, number)
                soundfile.write(folder / f"{number:03}.wav", samples, RATE_HZ)
                rows.append(f"{number:03}.wav,{emotion},{speaker},f,en,{seconds}")
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return Path(root)


def make_whisper(folder, *, seconds=30, seed=0, **changes):
    """Save a random Whisper with transformers, as a checkpoint of the hub is; return the model."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 64, "num_mel_bins": 80}
    sizes |= {"encoder_attention_heads": 2, "max_source_positions": seconds * 50, "vocab_size": 8}
    sizes |= {"decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 2}
    # The usual scale is for long training: so small a network would hardly mix anything with it.
    sizes |= {"init_std": 0.1, "max_target_positions": 4}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    tokens |= {"decoder_start_token_id": 0, "begin_suppress_tokens": None}
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes | tokens | changes)).eval()
    model.save_pretrained(folder)
    return model


def slow_sum(delay_s=0.0):
    """Return what takes its time to add up a window: a computation for `make_views`."""

    def compute(samples):
        time.sleep(delay_s)
        return {"sum": np.array([samples.sum(dtype=np.float64)]), "samples": samples}

    return compute
