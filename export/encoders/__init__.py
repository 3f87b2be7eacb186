"""Speech encoders: samples ``(N, T)`` to hidden states ``(N, S, F, D)``, one file a family.

Every encoder has ``states`` (S), ``dim`` (D) and ``frame_rate_hz``. In two steps, for students:
``features`` makes of samples what no training changes, at ``features_hz``, and ``encode`` makes of
that the hidden states; ``frames_of`` counts them.
"""

from pathlib import Path

import torch
from torch import nn

from export.checkpoint import locate
from export.encoders.mel import MelEncoder
from export.encoders.narrow import narrow
from export.encoders.wav import WavEncoder
from export.encoders.whisper import load_stem, load_whisper
from export.recipe import EncoderChoice
from export.views import Arrays, Compute, Samples

__all__ = ["encode_states", "load_encoder"]


def load_encoder(choice: EncoderChoice, weights: Path | None, window_s: float) -> nn.Module:
    """Build the encoder that a recipe names, filled from its checkpoint.

    Args:
        choice: The recipe's choice.
        weights: Folder of checkpoints; a source that is not in it is a hub id.
        window_s: Longest window in seconds.

    Raises:
        RecipeError: The checkpoint does not fit the choice.
    """
    if choice.family == "wav":
        return WavEncoder(choice.width, choice.layers)
    if choice.family == "wav2vec2":
        # transformers takes seconds to import, in every process, and no other family needs it.
        from export.encoders.wav2vec2 import load_wav2vec2

        return load_wav2vec2(choice.source, weights, choice.layers, choice.states)
    source = str(locate(choice.source, weights))
    if choice.family == "mel":
        return MelEncoder(load_stem(source), choice.width, choice.layers)
    whisper = load_whisper(source, choice.layers, window_s, choice.states)
    return narrow(whisper, choice.heads, choice.feed_forward)


def encode_states(
    choice: EncoderChoice, weights: Path | None, window_s: float, tuned: int
) -> Compute:
    """Return what computes the hidden states of a window that no training changes, as float16.

    They are the states (S, F at 25 Hz, D) that the head sees or, where the uppermost layers are
    tuned, the one (1, F at 50 Hz, D) below these.
    """
    encoder = load_encoder(choice, weights, window_s)

    @torch.no_grad()
    def compute(samples: Samples) -> Arrays:
        window = torch.from_numpy(samples)[None]
        states = encoder.below(window, choice.layers - tuned) if tuned else encoder(window)[0]
        return {"states": states.half().numpy()}

    return compute
