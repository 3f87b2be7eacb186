"""A small student: log-mel, two strided convolutions down to 25 Hz, dense residual blocks.

Dense convolutions over time, because they gain most from INT8; depthwise ones hardly gain at all.
Batch normalization, because it trains fastest and is folded into the convolutions afterwards.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.frontend import LogMel


class CentredLogMel(LogMel):
    """Log-mel whose bands have mean 0 over the window (cepstral mean subtraction, Atal 1974).

    What stays the same all the time, a microphone, a room or a level, is no emotion; a network
    that learns from a few thousand clips is spared from finding that out.
    """

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` to ``(N, bins, T // hop)``; 1 is 40 dB."""
        features = super().forward(samples) / 4
        return features - features.mean(dim=2, keepdim=True)


class ResidualBlock(nn.Module):
    """A residual convolution over time, batch-normalised."""

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv = normed_conv(dim, dim, 3, padding=dilation, dilation=dilation)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, D, F)`` to ``(N, D, F)``; masked frames enter the convolution as its padding."""
        heard = frames if mask is None else frames * mask
        return frames + self.dropout(functional.gelu(self.conv(heard)))


def normed_conv(dim: int, out: int, kernel: int, **options: int) -> nn.Sequential:
    """Return a convolution over time with batch normalization behind it."""
    return nn.Sequential(nn.Conv1d(dim, out, kernel, **options), nn.BatchNorm1d(out))


class MelEncoder(nn.Module):
    """Samples to one hidden state at 25 frames a second.

    Args:
        mels: Mel bands.
        width: Channels ``D``.
        layers: Residual blocks; their dilations are 1, 2, 4, 8, 1, ...
        dropout: Share of channels dropped in training.
    """

    frame_rate_hz = 25.0
    states = 1

    def __init__(self, mels: int, width: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = width
        self.mel = CentredLogMel(mels)
        self.halve = normed_conv(mels, width // 2, 5, stride=2, padding=2)
        self.quarter = normed_conv(width // 2, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, 2 ** (n % 4), dropout) for n in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, 1, F, D)``."""
        return self.encode(self.mel(samples))

    def encode(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-mel to hidden states.

        Args:
            features: As `CentredLogMel` gives them, ``(N, mels, F at 100 Hz)``.
            mask: Bool ``(N, 1, F at 25 Hz)``, true on real frames; none when nothing is padded.
        """
        frames = functional.gelu(self.halve(features))
        frames = functional.gelu(self.quarter(frames))  # (N, D, F at 25 Hz)
        for block in self.blocks:
            frames = block(frames, mask)
        return torch.unsqueeze(self.norm(frames.transpose(1, 2)), 1)  # (N, 1, F, D)


def frames_of(features: int) -> int:
    """Return how many frames `MelEncoder` makes of so many at 100 Hz: two halvings, rounded up."""
    return ((features + 1) // 2 + 1) // 2
