"""The lower layers of a Whisper encoder (arXiv 2212.04356), on windows as long as they are.

Written out rather than taken from transformers, whose encoder refuses anything but 30 s; the
parameter names are the checkpoint's, and a test holds the numbers against transformers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint import fill, locate, read_config, read_tensors
from export.errors import RecipeError
from export.frontend import LogMel


class SelfAttention(nn.Module):
    """Multi-head self-attention; as in Whisper, the key projection has no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """``(N, F, D)`` to ``(N, F, D)``; frames that are not real ``(N, 1, F)`` are not heard."""

        def split(projected: Tensor) -> Tensor:
            parts = projected.unflatten(-1, (self.heads, self.size))
            return parts.transpose(1, 2)  # (N, H, F, size)

        query = split(self.q_proj(hidden) * self.size**-0.5)
        scores = query @ split(self.k_proj(hidden)).transpose(2, 3)  # (N, H, F, F)
        if real is not None:
            scores = scores.masked_fill(~real[:, None], -1e4)
        mixed = scores.softmax(dim=-1) @ split(self.v_proj(hidden))
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, F, D)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, feed_forward)
        self.fc2 = nn.Linear(feed_forward, dim)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """``(N, F, D)`` to ``(N, F, D)``; see `SelfAttention` for ``real``."""
        hidden, inner = self._inner(hidden, real)
        return hidden + self.fc2(inner)

    def halved(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """Return `halved` of the layer's output, for half the work of its last projection.

        That projection is linear, so the mean of two frames may as well be taken before it.
        """
        hidden, inner = self._inner(hidden, real)
        return halved(hidden) + self.fc2(halved(inner))

    def _inner(self, hidden: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), real)
        return hidden, functional.gelu(self.fc1(self.final_layer_norm(hidden)))


class Neighbours(nn.Linear):
    """A convolution over three frames, padded by one, written as a matrix product.

    ONNX Runtime rounds the output of an INT8 convolution to 8 bits as well; the output of an INT8
    matrix product stays float. For Whisper's second convolution that was nearly half of the squared
    error of the logits.

    Args:
        dim: Channels of the input.
        out: Channels of the output.
        stride: Distance of the output's frames.
    """

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__(3 * dim, out)
        self.stride = stride

    def forward(self, frames: Tensor) -> Tensor:
        """``(N, F, dim)`` to ``(N, ceil(F / stride), out)``."""
        padded = functional.pad(frames, (0, 0, 1, 1))
        before, here, after = padded[:, :-2], padded[:, 1:-1], padded[:, 2:]
        stacked = torch.cat([part[:, :: self.stride] for part in (before, here, after)], dim=2)
        return super().forward(stacked)

    @staticmethod
    def from_kernel(kernel: Tensor) -> Tensor:
        """Return a convolution's kernel as weights: ``(out, dim, 3)`` to ``(out, 3 * dim)``."""
        return kernel.transpose(1, 2).flatten(1)


def halved(frames: Tensor) -> Tensor:
    """Return the means of two frames each, ``(N, F, D)`` to ``(N, F // 2, D)``."""
    even = frames.shape[1] // 2 * 2
    return frames[:, :even].unflatten(1, (-1, 2)).mean(dim=2)


def real_frames(lengths: Tensor, longest: int) -> Tensor:
    """Return which frames are real, bool ``(N, 1, longest)``: the first ``lengths`` of each."""
    return torch.arange(longest) < lengths[:, None, None]


class WhisperStem(nn.Module):
    """Where Whisper begins: log-mel and two convolutions, to frames at 50 Hz.

    The convolutions stay as they are pretrained, whatever is trained behind them.

    Args:
        mels: Mel bands.
        dim: Channels ``D`` of both convolutions, and of all that follows them in Whisper.
    """

    def __init__(self, mels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mel = LogMel(mels)
        self.conv1 = Neighbours(mels, dim, stride=1)
        self.conv2 = Neighbours(dim, dim, stride=2)
        self.requires_grad_(False)

    def features(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to log-mel ``(N, mels, F at 100 Hz)``."""
        return (self.mel(samples) + 4) / 4

    def convolve(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel to what the layers hear, but for the positions.

        Args:
            features: ``(N, mels, F at 100 Hz)``, zeros behind each clip.
            lengths: Real frames of each, int64 ``(N,)``; none when nothing is padded.

        Returns:
            Frames ``(N, ceil(F / 2), D)``.
        """
        hidden = functional.gelu(self.conv1(features.transpose(1, 2)))  # (N, F at 100 Hz, D)
        if lengths is not None:  # zeros behind a clip, as at the end of one that is alone
            hidden = hidden * real_frames(lengths, hidden.shape[1]).transpose(1, 2)
        return functional.gelu(self.conv2(hidden))  # (N, F at 50 Hz, D)


class WhisperEncoder(WhisperStem):
    """Samples to the hidden states of Whisper's lowest layers, at 25 frames a second.

    Args:
        config: The checkpoint's ``config.json``.
        layers: How many transformer layers are kept.
        window_s: Longest input in seconds; the position table is cut to it.
        states: How many of the hidden states are returned, the uppermost: 1 to ``layers + 1``, for
            the embedding has one too.

    Attributes:
        states: As given.
    """

    frame_rate_hz = 25.0
    features_hz = 100

    def __init__(self, config: dict, layers: int, window_s: float, states: int) -> None:
        super().__init__(config["num_mel_bins"], config["d_model"])
        self.states = states
        # The strided convolution rounds up: 101 frames at 100 Hz are 51 at 50 Hz.
        positions = (round(window_s * 16000) // 160 + 1) // 2
        if not 1 <= layers <= config["encoder_layers"]:
            raise RecipeError(
                f"layers = {layers}: this encoder has 1 to {config['encoder_layers']} layers"
            )
        if not 1 <= states <= layers + 1:
            raise RecipeError(f"states = {states}: {layers} layers have 1 to {layers + 1} states")
        if positions > config["max_source_positions"]:
            raise RecipeError(f"window_s = {window_s}: Whisper hears at most 30 s; shorten it")
        self.embed_positions = nn.Embedding(positions, self.dim).requires_grad_(False)
        self.layers = nn.ModuleList(
            Layer(self.dim, config["encoder_attention_heads"], config["encoder_ffn_dim"])
            for _ in range(layers)
        )

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, S, F, D)`` at 25 Hz."""
        return upper_states(self.layers, self.below(samples, 0), self.states)

    def below(self, samples: Tensor, layers: int) -> Tensor:
        """Float32 samples ``(N, T)`` to the hidden state ``(N, F at 50 Hz, D)`` behind layers."""
        hidden = self._begin(self.features(samples))
        for layer in self.layers[:layers]:
            hidden = layer(hidden)
        return hidden

    def _begin(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        hidden = self.convolve(features, lengths)
        return hidden + self.embed_positions.weight[: hidden.shape[1]]

    @staticmethod
    def frames_of(features: Tensor) -> Tensor:
        """Return how many frames at 25 Hz become of so many at 100 Hz."""
        return (features + 1) // 2 // 2

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel to hidden states, as in `forward`.

        Args:
            features: ``(N, mels, F at 100 Hz)``.
            lengths: Real frames of each, int64 ``(N,)``; none when nothing is padded.
        """
        hidden = self._begin(features, lengths)
        real = None if lengths is None else real_frames((lengths + 1) // 2, hidden.shape[1])
        return upper_states(self.layers, hidden, self.states, real)


def upper_states(
    layers: nn.ModuleList, hidden: Tensor, states: int, real: Tensor | None = None
) -> Tensor:
    """Return the uppermost hidden states of layers, at 25 Hz: ``(N, states, F, D)``.

    Args:
        layers: One `Layer` or more, the last ones of an encoder.
        hidden: What they are given, ``(N, F at 50 Hz, D)``.
        states: How many states are returned, 1 to ``len(layers) + 1``.
        real: Bool ``(N, 1, F at 50 Hz)``, true on real frames; none when nothing is padded.
    """
    found = [hidden]
    for layer in layers[:-1]:
        found.append(layer(found[-1], real))
    pairs = [*map(halved, found), layers[-1].halved(found[-1], real)]
    return torch.stack(pairs[-states:], dim=1)


def read_checkpoint(source: str) -> tuple[dict, dict[str, Tensor]]:
    """Read a checkpoint of Whisper.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, or a hub id.

    Returns:
        The configuration, and the tensors of the encoder by their names in `WhisperEncoder`.

    Raises:
        RecipeError: The checkpoint cannot be read.
    """
    folder = locate(source)
    tensors = {
        name.removeprefix("model.").removeprefix("encoder."): tensor
        for name, tensor in read_tensors(folder).items()
        if not name.removeprefix("model.").startswith("decoder.")
    }
    for name in ("conv1.weight", "conv2.weight"):
        if name in tensors:
            tensors[name] = Neighbours.from_kernel(tensors[name])
    return read_config(folder), tensors


def load_whisper(source: str, layers: int, window_s: float, states: int) -> WhisperEncoder:
    """Build the encoder and fill it from a checkpoint, every tensor accounted for.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, or a hub id.
        layers: How many transformer layers are kept; the others are left out.
        window_s: Longest input in seconds.
        states: How many of the uppermost hidden states are returned.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        RecipeError: The checkpoint cannot be read, lacks a tensor, or holds one that the encoder
            has no place for.
    """
    config, tensors = read_checkpoint(source)
    encoder = WhisperEncoder(config, layers, window_s, states)
    left_out = ("layer_norm.", *(f"layers.{n}." for n in range(layers, 100)))
    tensors = {name: t for name, t in tensors.items() if not name.startswith(left_out)}
    positions = tensors.get("embed_positions.weight")
    if positions is not None:
        tensors["embed_positions.weight"] = positions[: encoder.embed_positions.num_embeddings]
    fill(encoder, tensors, source, made_here(encoder))
    return encoder.eval()


def load_stem(source: str) -> WhisperStem:
    """Build the two convolutions that Whisper begins with and fill them from a checkpoint.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, or a hub id.

    Raises:
        RecipeError: The checkpoint cannot be read or lacks a tensor.
    """
    config, tensors = read_checkpoint(source)
    stem = WhisperStem(config["num_mel_bins"], config["d_model"])
    convolutions = {n: t for n, t in tensors.items() if n.startswith("conv")}
    fill(stem, convolutions, source, made_here(stem))
    return stem.eval()


def made_here(stem: WhisperStem) -> list[str]:
    """Return the tensors of the front end, which no checkpoint has."""
    return [name for name in stem.state_dict() if name.startswith("mel.")]
