"""Log-mel front end as two fixed convolutions, so that it lives inside the graph.

ONNX Runtime's ``STFT`` takes about ten times as long as the same transform written as a strided
convolution with a fixed DFT basis, and TensorRT has no ``STFT`` at all.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_ser.errors import EdgeSerError


def band_edges_hz(
    bins: int, rate_hz: int, low_hz: float = 0.0, high_hz: float | None = None
) -> np.ndarray:
    """Where triangular mel bands begin, peak and end: band i at i, i + 1 and i + 2.

    Evenly on the Slaney mel scale, which is linear below 1 kHz and logarithmic above (Auditory
    Toolbox, 1998); it is the one that Whisper was trained with.

    Args:
        bins: Number of bands.
        rate_hz: Sampling rate in Hz.
        low_hz: Lower edge of the first band in Hz.
        high_hz: Upper edge of the last band in Hz; half the sampling rate without it.

    Returns:
        float64 array ``(bins + 2,)`` in Hz.
    """
    linear_hz, step_hz, log_step = 1000.0, 200.0 / 3, np.log(6.4) / 27

    def to_mel(hz: float) -> float:
        if hz < linear_hz:
            return hz / step_hz
        return linear_hz / step_hz + float(np.log(hz / linear_hz)) / log_step

    def to_hz(mel: np.ndarray) -> np.ndarray:
        knee = linear_hz / step_hz
        above = linear_hz * np.exp(log_step * (np.maximum(mel, knee) - knee))
        return np.where(mel < knee, mel * step_hz, above)

    return to_hz(np.linspace(to_mel(low_hz), to_mel(high_hz or rate_hz / 2), bins + 2))


def mel_filterbank(
    bins: int, n_fft: int, rate_hz: int, low_hz: float = 0.0, high_hz: float | None = None
) -> np.ndarray:
    """Triangular filters of unit area on the Slaney mel scale, as `band_edges_hz` places them.

    Args:
        bins: Number of mel bands.
        n_fft: Length of the DFT in samples.
        rate_hz: Sampling rate in Hz.
        low_hz: Lower edge of the first band in Hz.
        high_hz: Upper edge of the last band in Hz; half the sampling rate without it.

    Returns:
        float32 array ``(bins, n_fft // 2 + 1)``.
    """
    edges_hz = band_edges_hz(bins, rate_hz, low_hz, high_hz)
    bins_hz = np.linspace(0, rate_hz / 2, n_fft // 2 + 1)
    lower, centre, upper = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising = (bins_hz - lower) / (centre - lower)
    falling = (upper - bins_hz) / (upper - centre)
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (upper - lower)
    if not filters.any(axis=1).all():
        raise EdgeSerError(
            f"{bins} mel bands leave some band without a DFT bin at n_fft={n_fft}; use fewer bands"
        )
    return filters.astype(np.float32)


class LogMel(nn.Module):
    """Samples to log10 mel power, floored ``range_db`` below the loudest point of the window.

    Args:
        bins: Number of mel bands.
        rate_hz: Sampling rate in Hz.
        n_fft: Length of the Hann window and of the DFT in samples.
        hop: Distance of the frames in samples.
        range_db: Depth of the floor below the maximum in dB. The maximum is taken over the
            window's own frames, so nothing outside the window can change the answer.
    """

    def __init__(
        self,
        bins: int,
        rate_hz: int = 16000,
        n_fft: int = 400,
        hop: int = 160,
        range_db: float = 80.0,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop, self.range_db = n_fft, hop, range_db
        time = np.arange(n_fft)
        angle = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), time) / n_fft
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / n_fft)
        basis = np.concatenate([np.cos(angle) * hann, np.sin(angle) * hann])
        self.register_buffer("basis", torch.from_numpy(basis.astype(np.float32))[:, None])
        filters = mel_filterbank(bins, n_fft, rate_hz)
        self.register_buffer("filters", torch.from_numpy(filters)[:, :, None])

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` to log10 power ``(N, bins, T // hop)``."""
        half = self.n_fft // 2
        padded = functional.pad(samples[:, None], (half, half - self.hop), mode="reflect")
        real, imaginary = functional.conv1d(padded, self.basis, stride=self.hop).chunk(2, dim=1)
        power = functional.conv1d(real.square() + imaginary.square(), self.filters)
        log_power = power.clamp(min=1e-10).log10()
        floor = log_power.amax(dim=(1, 2), keepdim=True) - self.range_db / 10
        return torch.maximum(log_power, floor)  # (N, bins, F)
