"""Wav2Vec2 and its kin: XLSR-53, XLS-R, HuBERT and WavLM, as transformers builds them.

Samples go through seven convolutions to 50 frames a second, then through transformer layers
(arXiv 2006.11477, 2006.13979, 2111.09296, 2106.07447, 2110.13900).
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModel, PretrainedConfig

from export.checkpoint import EXTRACTOR, fill, locate, read_tensors
from export.encoders.wavlm import write_out
from export.encoders.whisper import halved
from export.errors import RecipeError

KINDS = ("wav2vec2", "hubert", "wavlm")
"""What ``model_type`` of a checkpoint's config may be."""

NOT_HEARD = "masked_spec_embed"  # stands for masked frames, in pretraining only


class Wav2Vec2Encoder(nn.Module):
    """Samples to the hidden states of the lowest layers, at 25 frames a second.

    Args:
        model: The network of transformers, with all its layers.
        layers: How many transformer layers are kept.
        states: How many of the uppermost hidden states are returned, 1 to ``layers + 1``.
        normalised: Whether it was trained on windows of mean 0 and variance 1.
    """

    frame_rate_hz = 25.0

    def __init__(self, model: nn.Module, layers: int, states: int, normalised: bool) -> None:
        super().__init__()
        every = len(model.encoder.layers)
        if not 1 <= layers <= every:
            raise RecipeError(f"layers = {layers}: this encoder has 1 to {every} layers")
        if not 1 <= states <= layers + 1:
            raise RecipeError(f"states = {states}: {layers} layers have 1 to {layers + 1} states")
        self.states, self.dim, self.normalised = states, model.config.hidden_size, normalised
        self.model = model
        del model.encoder.layers[layers:]
        if layers < every and model.config.do_stable_layer_norm:
            model.encoder.layer_norm = nn.Identity()  # it is made for what the last layer gives

    def forward(self, samples: Tensor) -> Tensor:
        """Float32 samples ``(N, T)`` at 16 kHz to hidden states ``(N, S, F, D)`` at 25 Hz."""
        heard = normalised(samples) if self.normalised else samples
        found = self.model(heard, output_hidden_states=True)
        # The last one may have a norm of its own: transformers 5 lists it without, 4 with it.
        states = [*found.hidden_states[:-1], found.last_hidden_state]
        return torch.stack([halved(state) for state in states[-self.states :]], dim=1)


def normalised(samples: Tensor) -> Tensor:
    """Return windows ``(N, T)`` of mean 0 and variance 1, as the models' extractor makes them."""
    centred = samples - samples.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()


def load_wav2vec2(source: str, weights: Path | None, layers: int, states: int) -> Wav2Vec2Encoder:
    """Build the encoder and fill it from a checkpoint, every tensor accounted for.

    Args:
        source: A folder, a folder under ``weights``, or a hub id.
        weights: Folder of checkpoints.
        layers: How many transformer layers are kept.
        states: How many of the uppermost hidden states are returned.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        RecipeError: The checkpoint cannot be read, is of another kind, lacks a tensor, or holds one
            that the network has no place for.
    """
    folder = locate(source, weights)
    # What other forms of attention export to is more nodes, or one that TensorRT cannot read.
    model = AutoModel.from_config(read(folder, source), attn_implementation="eager")
    prefix = f"{model.base_model_prefix}."
    tensors = read_tensors(folder)
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    # Behind the prefix lies the encoder; beside it the heads that it was pretrained with.
    fill_encoder(model, inside or tensors, source)
    return Wav2Vec2Encoder(model, layers, states, hears_normalised(folder)).eval()


def read(folder: Path, source: str) -> PretrainedConfig:
    """Return the config of a checkpoint.

    Raises:
        RecipeError: It cannot be read, or is of another kind.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as exc:
        line = str(exc).partition("\n")[0]
        raise RecipeError(f"checkpoint {source!r}: its config cannot be read ({line})") from exc
    if config.model_type not in KINDS:
        raise RecipeError(
            f"checkpoint {source!r} is a {config.model_type!r}; allowed are {', '.join(KINDS)}"
        )
    return config


def fill_encoder(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a network of transformers, and make it ready for export.

    Weight normalization is merged: else its products would be computed in the graph, whose weights
    no quantizer could tell. A group normalization of single channels is written as what it is, an
    instance normalization: one pass over the longest tensor of the network in place of three.

    Raises:
        RecipeError: As of `export.checkpoint.fill`.
    """
    made = [name for name in model.state_dict() if name.endswith(NOT_HEARD)]
    heard = {name: t for name, t in tensors.items() if not name.endswith(NOT_HEARD)}
    fill(model, heard, source, made)
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
        for name, norm in module.named_children():
            if isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels:
                single = nn.InstanceNorm1d(norm.num_channels, norm.eps, affine=True)
                single.weight, single.bias = norm.weight, norm.bias
                setattr(module, name, single)
    write_out(model)


def hears_normalised(folder: Path) -> bool:
    """Return whether a checkpoint asks for windows of mean 0 and variance 1."""
    file = folder / EXTRACTOR
    return bool(json.loads(file.read_text()).get("do_normalize", True)) if file.exists() else True
