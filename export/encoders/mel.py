"""A small student: the two convolutions that Whisper begins with, then dense residual blocks.

The pretrained convolutions stay as they are. They were trained on 680 000 hours of speech, the
student hears some fifty speakers: what it learns behind them holds for other speakers far better
than what it learns from log-mel alone (README, "What it scores").

Dense convolutions over time, because they gain most from INT8; depthwise ones hardly gain at all.
Batch normalization, because it trains fastest and is folded into the convolutions afterwards.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.encoders.whisper import WhisperStem, real_frames


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
        stem: Pretrained; it is not trained further.
        width: Channels ``D``.
        layers: Residual blocks; their dilations are 1, 2, 4, 8, 1, ...
        dropout: Share of channels dropped in training.
    """

    frame_rate_hz = 25.0
    features_hz = 100
    states = 1

    def __init__(self, stem: WhisperStem, width: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = width
        self.stem = stem
        self.even = nn.BatchNorm1d(stem.dim)
        self.halve = normed_conv(stem.dim, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, 2 ** (n % 4), dropout) for n in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, 1, F, D)``."""
        return self.encode(self.features(samples))

    def features(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to log-mel ``(N, mels, F at 100 Hz)``."""
        return self.stem.features(samples)

    @staticmethod
    def frames_of(features: Tensor) -> Tensor:
        """Return how many frames become of so many at 100 Hz: two halvings, rounded up."""
        return (features + 3) // 4

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel to hidden states.

        Args:
            features: ``(N, mels, F at 100 Hz)``.
            lengths: Real frames of each, int64 ``(N,)``; none when nothing is padded.
        """
        mask = None
        if lengths is not None:
            longest = torch.tensor(features.shape[2])
            mask = real_frames(self.frames_of(lengths), int(self.frames_of(longest)))
        # A few of the stem's channels are far louder than the others.
        heard = self.stem.convolve(features, lengths)
        frames = self.even(heard.transpose(1, 2))  # (N, dim, F at 50 Hz)
        frames = functional.gelu(self.halve(frames))  # (N, D, F at 25 Hz)
        for block in self.blocks:
            frames = block(frames, mask)
        return torch.unsqueeze(self.norm(frames.transpose(1, 2)), 1)  # (N, 1, F, D)
