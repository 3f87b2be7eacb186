"""One network from samples to logits: an encoder and a head."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.encoders import load_encoder
from export.encoders.whisper import upper_states
from export.heads import CnnHead
from export.recipe import Recipe
from export.tune import TunedHead


class Classifier(nn.Module):
    """What is exported, and what a student learns from."""

    def __init__(self, encoder: nn.Module, head: CnnHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 samples ``(N, T)`` to logits ``(N, C)`` and embedding ``(N, D)``."""
        return self.head(self.encoder(samples))

    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for what `features` of the encoder makes of samples."""
        return self.head(self.encoder.encode(features))

    def fold_norms(self) -> "Classifier":
        """Merge each batch normalization into the convolution before it; evaluation mode only."""
        for module in self.modules():
            if isinstance(module, nn.Sequential) and isinstance(module[1], nn.BatchNorm1d):
                module[0] = fuse_conv_bn_eval(module[0], module[1])
                module[1] = nn.Identity()
        return self


def new_classifier(recipe: Recipe, weights: Path | None) -> Classifier:
    """Return the network of a recipe: the encoder pretrained where it is, the head untrained."""
    encoder = load_encoder(recipe.encoder, weights, recipe.windows.window_s)
    labels = len(recipe.data.labels)
    return Classifier(encoder, CnnHead(encoder.states, encoder.dim, labels, **asdict(recipe.head)))


def trained_part(recipe: Recipe, model: Classifier) -> nn.Module:
    """Return what a recipe's training changes of its network; the modules are the network's own."""
    if recipe.distill:
        return model
    assert recipe.train  # a recipe has either [train] or [distill]
    if not recipe.train.tuned:
        return model.head
    return TunedHead(model.encoder.layers[-recipe.train.tuned :], model.encoder.states, model.head)


def lift(recipe: Recipe, model: Classifier) -> Callable[[Tensor], Tensor]:
    """Return what makes of cached states ``(N, S, F, D)`` those that the network's head sees."""
    assert recipe.train  # only such recipes cache states
    tuned = recipe.train.tuned
    if not tuned:
        return lambda states: states
    layers, count = model.encoder.layers[-tuned:], model.encoder.states

    @torch.no_grad()
    def through(states: Tensor) -> Tensor:
        return upper_states(layers, states[:, 0].float(), count)

    return through


def load_classifier(recipe: Recipe, weights: Path | None, trained: Path) -> Classifier:
    """Return the trained network of a recipe, in evaluation mode.

    Args:
        recipe: Of the model.
        weights: Folder of pretrained checkpoints.
        trained: ``model.safetensors`` of the training stage: `trained_part` of the network.
    """
    model = new_classifier(recipe, weights)
    trained_part(recipe, model).load_state_dict(load_file(trained))
    return model.eval()
