"""Fine-tuning of the uppermost layers of a pretrained encoder, together with the head."""

from typing import Any

from torch import Tensor, nn

from export.encoders.whisper import upper_states
from export.heads import CnnHead
from export.recipe import Train


class TunedHead(nn.Module):
    """The uppermost layers of Whisper and the head behind them.

    Args:
        layers: Those that are tuned.
        states: How many hidden states the head weighs.
        head: Behind them.
    """

    frame_rate_hz = 50
    upper = 1  # it sees a single state, that below the layers

    def __init__(self, layers: nn.ModuleList, states: int, head: CnnHead) -> None:
        super().__init__()
        self.layers, self.states, self.head = layers, states, head

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state below the layers to logits and embedding.

        Args:
            states: Float32 ``(N, 1, F at 50 Hz, D)``.
            mask: Bool ``(N, 1, F at 50 Hz)``, true on real frames; none when nothing is padded.
        """
        found = upper_states(self.layers, states[:, 0], self.states, mask)
        return self.head(found.float(), None if mask is None else pairs(mask))


def pairs(mask: Tensor) -> Tensor:
    """Return which pairs of frames are real, ``(N, 1, F)`` to ``(N, 1, F // 2)``."""
    even = mask.shape[2] // 2 * 2
    return mask[:, :, :even].unflatten(2, (-1, 2)).all(dim=-1)


def parameter_groups(network: nn.Module, settings: Train) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, each with its peak ``rate`` and when it ``start``s.

    Lower layers learn more slowly than upper ones (layer-wise decay, arXiv 1801.06146), and none
    before the head knows what it wants of them.
    """
    if not isinstance(network, TunedHead):
        return [{"params": list(network.parameters()), "rate": settings.learning_rate, "start": 0}]
    groups = parameter_groups(network.head, settings)
    for depth, layer in enumerate(reversed(network.layers)):
        rate = settings.tuned_rate * settings.layer_decay**depth
        groups.append({"params": list(layer.parameters()), "rate": rate, "start": settings.hold})
    return groups
