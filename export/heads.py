"""The CNN head: hidden states of a speech encoder to an embedding and logits.

Beside the convolutions runs a linear probe of the statistics of the states: what a probe can tell
need not be learned by convolutions. On two of five folds of the training speakers (recipe
``default``, seed 0) it raised pooled UA from .709 to .726. Where it sees each state by itself,
pooled UA of speakers that were not heard rises from .700 to .711 (four folds, three seeds), and
with ridge regression of more states than gradients see, further: see `export.ridge`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted per channel (arXiv 1803.10963)."""

    def __init__(self, dim: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Conv1d(dim, bottleneck, 1), nn.Tanh(), nn.Conv1d(bottleneck, dim, 1)
        )

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, D, F)`` and a mask ``(N, 1, F)`` of real frames to ``(N, 2 * D)``."""
        scores = self.score(frames)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        weights = scores.softmax(dim=-1)
        mean = (weights * frames).sum(dim=-1)
        variance = (weights * (frames - mean[..., None]).square()).sum(dim=-1)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


class DilatedBlock(nn.Module):
    """A residual convolution over time on layer-normalised channels."""

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, dim, 3, padding=dilation, dilation=dilation)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, D, F)`` to ``(N, D, F)``; masked frames enter the convolution as its padding."""
        normed = self.norm(frames.transpose(1, 2)).transpose(1, 2)
        if mask is not None:
            normed = normed * mask
        return frames + self.dropout(functional.gelu(self.conv(normed)))


def statistics(frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return mean and standard deviation over time: ``(N, F, D)`` to ``(N, 2 * D)``.

    Args:
        frames: Float32.
        mask: Bool ``(N, 1, F)``, true on real frames; none when nothing is padded.
    """
    if mask is None:
        mean = frames.mean(dim=1)
        variance = (frames - mean[:, None]).square().mean(dim=1)
    else:
        real = mask.transpose(1, 2).to(frames.dtype)  # (N, F, 1)
        share = real / real.sum(dim=1, keepdim=True)
        mean = (frames * share).sum(dim=1)
        variance = ((frames - mean[:, None]).square() * share).sum(dim=1)
    return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


class CnnHead(nn.Module):
    """Learned weighting of hidden states, 1x1 projection, dilated blocks, attentive pooling.

    Args:
        states: Number ``S`` of hidden states; the last is the uppermost.
        dim: Width ``D`` of a hidden state.
        classes: Number ``C`` of labels.
        width: Channels after the projection; the embedding is twice as wide.
        dropout: Share of channels and of embedding values dropped in training.
        probe_dropout: Share of what the probe sees that is dropped in training.
        each_state: Whether the probe sees each state by itself, or the weighted one.
        upper: How many of the uppermost states gradients see: the convolutions weigh these, and
            training by gradients leaves what the probe sees of lower ones at weight 0.
    """

    def __init__(
        self,
        states: int,
        dim: int,
        classes: int,
        width: int = 256,
        dropout: float = 0.2,
        probe_dropout: float = 0.2,
        each_state: bool = True,
        upper: int = 3,
    ) -> None:
        super().__init__()
        self.each_state = each_state
        self.embedding_dim = 2 * width
        self.upper = min(upper, states)
        self.weights = nn.Parameter(torch.zeros(self.upper))
        self.drop_channels = nn.Dropout1d(dropout)
        self.drop_values = nn.Dropout(dropout)
        self.drop_probed = nn.Dropout(probe_dropout)
        self.project = nn.Conv1d(dim, width, 1)
        self.blocks = nn.ModuleList(DilatedBlock(width, d, dropout) for d in (1, 2))
        self.pool = AttentivePooling(width)
        self.norm = nn.LayerNorm(2 * width)
        self.classify = nn.Linear(2 * width, classes)
        self.probe_norm = nn.LayerNorm(2 * dim)
        self.probe = nn.Linear((states if each_state else 1) * 2 * dim, classes)
        lower = (states - self.upper) * 2 * dim if each_state else 0
        self.register_buffer("trained", torch.arange(self.probe.in_features) >= lower, False)
        nn.init.zeros_(self.probe.weight[:, :lower])

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states to logits and embedding.

        Args:
            states: Float32 ``(N, S, F, D)``.
            mask: Bool ``(N, 1, F)``, true on real frames; none when nothing is padded.

        Returns:
            Logits ``(N, C)`` and embedding ``(N, 2 * width)``.
        """
        # Hidden states differ by orders of magnitude from layer to layer; normalising each makes
        # the learned weights mean what they say.
        states = functional.layer_norm(states, states.shape[-1:])
        embedding = self.norm(self.pool(self.convolve(self.mix(states), mask), mask))
        probed = self.probed(states, mask)
        if self.training:
            probed = self.drop_probed(probed) * self.trained
        return self.classify(self.drop_values(embedding)) + self.probe(probed), embedding

    def probed(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what the probe sees of normalised states ``(N, S, F, D)``, ``2 * D`` of each."""
        seen = states.unbind(dim=1) if self.each_state else [self.mix(states)]
        return torch.cat([self.probe_norm(statistics(state, mask)) for state in seen], dim=1)

    def mix(self, states: Tensor) -> Tensor:
        """Weigh the uppermost of normalised hidden states ``(N, S, F, D)``: ``(N, F, D)``."""
        shares, upper = self.weights.softmax(dim=0).unbind(), states.unbind(dim=1)[-self.upper :]
        return sum(share * state for share, state in zip(shares, upper, strict=True))

    def convolve(self, mixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames ``(N, F, D)`` to those that are pooled, ``(N, width, F)``."""
        frames = functional.gelu(self.project(self.drop_channels(mixed.transpose(1, 2))))
        for block in self.blocks:
            frames = block(frames, mask)
        return frames

    def frames(self, states: Tensor) -> Tensor:
        """Return the frames that are pooled, ``(N, width, F)``, of states ``(N, S, F, D)``."""
        return self.convolve(self.mix(functional.layer_norm(states, states.shape[-1:])))


class HeadEnsemble(nn.Module):
    """Heads that were trained apart, each by its own chance, and answer together.

    Three of them (recipe ``default``, four folds) had a pooled UA of .736 on speakers that were not
    heard, where each by itself had .733, .721 and .720, when ridge regression heard the clips as
    recorded alone; with its augmented views three have .727, one by itself is not measured.

    Args:
        members: Alike in form.
    """

    def __init__(self, members: Sequence[CnnHead]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.embedding_dim = sum(member.embedding_dim for member in members)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of `CnnHead`: the mean of the logits, and the embeddings one behind the other."""
        logits, embeddings = zip(*(member(states, mask) for member in self.members), strict=True)
        return sum(logits) / len(logits), torch.cat(embeddings, dim=1)
