"""One network from samples to logits: an encoder and a head."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from export.encoders import load_encoder
from export.heads import CnnHead
from export.recipe import Recipe


class Classifier(nn.Module):
    """What is exported, and what a student learns from."""

    def __init__(self, encoder: nn.Module, head: CnnHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 samples ``(N, T)`` to logits ``(N, C)`` and embedding ``(N, D)``."""
        return self.head(self.encoder(samples))


def new_head(recipe: Recipe, states: int, dim: int) -> CnnHead:
    """Return the untrained head of a recipe for hidden states ``(N, states, F, dim)``."""
    labels = len(recipe.data.labels)
    return CnnHead(states, dim, labels, recipe.head.width, recipe.head.dropout)


def new_classifier(recipe: Recipe, weights: Path | None) -> Classifier:
    """Return the network of a recipe: the encoder pretrained where it is, the head untrained."""
    encoder = load_encoder(recipe.encoder, weights, recipe.windows.window_s)
    return Classifier(encoder, new_head(recipe, encoder.states, encoder.dim))


def load_classifier(recipe: Recipe, weights: Path | None, trained: Path) -> Classifier:
    """Return the trained network of a recipe, in evaluation mode.

    Args:
        recipe: Of the model.
        weights: Folder of pretrained checkpoints.
        trained: ``model.safetensors`` of the training stage: the head of a frozen encoder, or the
            whole student.
    """
    model = new_classifier(recipe, weights)
    part = model.head if recipe.train else model
    part.load_state_dict(load_file(trained))
    return model.eval()
