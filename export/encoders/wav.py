"""A student that hears samples: thin strided convolutions, then transformer layers.

The plan of wav2vec 2.0 (arXiv 2006.11477), thinner: five convolutions in place of seven, widening
as the rate falls, and 25 frames a second in place of 50. Nothing in it is pretrained.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.encoders.mel import normed_conv
from export.encoders.whisper import Layer, real_frames

KERNELS = (11, 9, 5, 5, 3)
STRIDES = (5, 4, 4, 4, 2)
RATE = math.prod(STRIDES)  # samples a frame
HEAD_DIM = 32


class WavEncoder(nn.Module):
    """Samples to one hidden state at 25 frames a second.

    Args:
        width: Channels ``D`` behind the convolutions: a multiple of 32.
        layers: Transformer layers.
        dropout: Share of channels dropped in training behind the convolutions.
    """

    frame_rate_hz = 25.0
    features_hz = 16000
    states = 1

    def __init__(self, width: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = width
        widths = (1, width // 8, width // 4, width // 2, width, width)
        self.convolutions = nn.ModuleList(
            normed_conv(dim, out, kernel, stride=stride, padding=kernel // 2)
            for dim, out, kernel, stride in zip(widths, widths[1:], KERNELS, STRIDES, strict=False)
        )
        # As in wav2vec 2.0, a wide convolution tells the layers what stands where; a channel each.
        self.position = nn.Conv1d(width, width, 31, padding=15, groups=width)
        self.dropout = nn.Dropout1d(dropout)
        self.layers = nn.ModuleList(
            Layer(width, width // HEAD_DIM, 4 * width) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, 1, F, D)``."""
        return self.encode(self.features(samples))

    def features(self, samples: Tensor) -> Tensor:
        """Return the samples at a level of their own, ``(N, 1, T)``: mean 0, variance 1."""
        centred = samples - samples.mean(dim=1, keepdim=True)
        # A bound, and no small number that is added: the exporter takes that for 0.
        level = centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-5)
        return (centred / level)[:, None]

    @staticmethod
    def frames_of(features: Tensor) -> Tensor:
        """Return how many frames become of so many samples: each stride rounds up."""
        return (features + RATE - 1) // RATE

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Samples at an even level to hidden states.

        Args:
            features: ``(N, 1, T)``.
            lengths: Real samples of each, int64 ``(N,)``; none when nothing is padded.
        """
        frames, mask = features, None
        for convolution, stride in zip(self.convolutions, STRIDES, strict=True):
            frames = functional.gelu(convolution(frames))
            if lengths is not None:  # zeros behind a clip, as at the end of one that is alone
                lengths = (lengths + stride - 1) // stride
                mask = real_frames(lengths, frames.shape[2])
                frames = frames * mask
        frames = self.dropout(frames + functional.gelu(self.position(frames)))
        hidden = frames.transpose(1, 2)  # (N, F, D)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return torch.unsqueeze(self.norm(hidden), 1)  # (N, 1, F, D)
