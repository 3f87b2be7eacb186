"""A small student: log-mel, two strided convolutions down to 25 Hz, dense residual blocks.

Dense convolutions over time, because they gain most from INT8; depthwise ones hardly gain at all.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.frontend import LogMel
from export.heads import DilatedBlock


class MelEncoder(nn.Module):
    """Samples to one hidden state at 25 frames a second.

    Args:
        mels: Mel bands.
        width: Channels ``D``.
        layers: Residual blocks; their dilations are 1, 2, 4, 8, 1, ...
        dropout: Share of values dropped in training.
    """

    frame_rate_hz = 25.0
    states = 1

    def __init__(self, mels: int, width: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = width
        self.mel = LogMel(mels)
        self.halve = nn.Conv1d(mels, width // 2, 5, stride=2, padding=2)
        self.quarter = nn.Conv1d(width // 2, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            DilatedBlock(width, 2 ** (n % 4), dropout) for n in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, 1, F, D)``."""
        return self.encode(self.features(samples))

    def features(self, samples: Tensor) -> Tensor:
        """Samples ``(N, T)`` to scaled log-mel ``(N, mels, T // 160)`` at 100 Hz."""
        return (self.mel(samples) + 4) / 4

    def encode(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-mel to hidden states.

        Args:
            features: ``(N, mels, F at 100 Hz)``.
            mask: Bool ``(N, 1, F at 25 Hz)``, true on real frames; none when nothing is padded.
        """
        frames = functional.gelu(self.halve(features))
        frames = functional.gelu(self.quarter(frames))  # (N, D, F at 25 Hz)
        for block in self.blocks:
            frames = block(frames, mask)
        return torch.unsqueeze(self.norm(frames.transpose(1, 2)), 1)  # (N, 1, F, D)
