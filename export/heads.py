"""The CNN head: hidden states of a speech encoder to an embedding and logits.

Beside the convolutions runs a linear probe of the statistics of the states: what a probe can tell
need not be learned by convolutions. On two of five folds of the training speakers (recipe
``default``, seed 0) it raised pooled UA from .709 to .726. Where it sees each state by itself,
pooled UA of speakers that were not heard rises from .700 to .711 (four folds, three seeds), and
with ridge regression of more states than gradients see, further: see `export.ridge`. Convolutions
and probe see the states layer-normalised: that makes the learned weights mean what they say.
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


def normalised(states: Tensor) -> Tensor:
    """Layer-normalise hidden states ``(N, S, F, D)``, which differ by orders of magnitude."""
    return functional.layer_norm(states, states.shape[-1:])


def probed(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what the probe sees of normalised states ``(N, S, F, D)``: ``(N, S * 2 * D)``."""
    seen = [statistics(state, mask) for state in states.unbind(dim=1)]
    return torch.cat([functional.layer_norm(one, one.shape[-1:]) for one in seen], dim=1)


class Convolutions(nn.Module):
    """Learned weighting of hidden states, 1x1 projection, dilated blocks, attentive pooling.

    Args:
        states: How many hidden states it weighs.
        dim: Width ``D`` of a hidden state.
        classes: Number ``C`` of labels.
        width: Channels after the projection; the embedding is twice as wide.
        dropout: Share of channels and of embedding values dropped in training.
    """

    def __init__(self, states: int, dim: int, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))
        self.drop_channels = nn.Dropout1d(dropout)
        self.drop_values = nn.Dropout(dropout)
        self.project = nn.Conv1d(dim, width, 1)
        self.blocks = nn.ModuleList(DilatedBlock(width, d, dropout) for d in (1, 2))
        self.pool = AttentivePooling(width)
        self.norm = nn.LayerNorm(2 * width)
        self.classify = nn.Linear(2 * width, classes)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised states ``(N, S, F, D)`` to logits and embedding, as of `CnnHead`."""
        embedding = self.norm(self.pool(self.frames(states, mask), mask))
        return self.classify(self.drop_values(embedding)), embedding

    def frames(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the frames that are pooled, ``(N, width, F)``, of normalised states."""
        shares = self.weights.softmax(dim=0).unbind()
        upper = states.unbind(dim=1)[-len(shares) :]
        mixed = sum(share * state for share, state in zip(shares, upper, strict=True))
        frames = functional.gelu(self.project(self.drop_channels(mixed.transpose(1, 2))))
        for block in self.blocks:
            frames = block(frames, mask)
        return frames


class CnnHead(nn.Module):
    """Convolutions, and beside them a linear probe of the statistics of the states.

    Several members are convolutions that were trained apart, each by its own chance, and answer
    together. Three of them (recipe ``default``, four folds) had a pooled UA of .736 on speakers
    that were not heard, where each by itself had .733, .721 and .720, when ridge regression heard
    the clips as recorded alone.

    Args:
        states: Number ``S`` of hidden states; the last is the uppermost.
        dim: Width ``D`` of a hidden state.
        classes: Number ``C`` of labels.
        width: See `Convolutions`, as for ``dropout``.
        dropout: In training.
        probe_dropout: Share of what the probe sees that is dropped in training.
        upper: How many of the uppermost states gradients see; training leaves what the probe sees
            of lower ones at weight 0.
        members: How many convolutions.
    """

    def __init__(
        self,
        states: int,
        dim: int,
        classes: int,
        width: int = 256,
        dropout: float = 0.2,
        probe_dropout: float = 0.2,
        upper: int = 3,
        members: int = 1,
    ) -> None:
        super().__init__()
        self.upper = min(upper, states)
        self.embedding_dim = members * 2 * width
        self.members = nn.ModuleList(
            Convolutions(self.upper, dim, classes, width, dropout) for _ in range(members)
        )
        self.drop_probed = nn.Dropout(probe_dropout)
        self.probe = nn.Linear(states * 2 * dim, classes)
        nn.init.zeros_(self.probe.weight[:, : (states - self.upper) * 2 * dim])

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states to logits and embedding.

        Args:
            states: Float32 ``(N, S, F, D)``; in training the uppermost are enough.
            mask: Bool ``(N, 1, F)``, true on real frames; none when nothing is padded.

        Returns:
            Logits ``(N, C)``, and the embeddings of the members one behind the other,
            ``(N, members * 2 * width)``.
        """
        weight = self.probe.weight
        if self.training:
            states = states[:, -self.upper :]
            weight = weight[:, -self.upper * 2 * states.shape[-1] :]
        states = normalised(states)
        logits, embeddings = zip(*(member(states, mask) for member in self.members), strict=True)
        by_probe = functional.linear(
            self.drop_probed(probed(states, mask)), weight, self.probe.bias
        )
        return sum(logits) / len(logits) + by_probe, torch.cat(embeddings, dim=1)

    @torch.no_grad()
    def join(self, heads: Sequence["CnnHead"]) -> None:
        """Become the mean of heads of one member each, as many as this one has.

        Probes are linear in the same statistics: their mean is one probe.
        """
        for member, head in zip(self.members, heads, strict=True):
            member.load_state_dict(head.members[0].state_dict())
        for name in ("weight", "bias"):
            each = torch.stack([getattr(head.probe, name) for head in heads])
            getattr(self.probe, name).copy_(each.mean(dim=0))
