"""Narrower transformer layers: the attention heads and hidden units that matter least are cut.

Structured pruning as DPHuBERT does it (arXiv 2305.17651), with the norms of the weights in place of
learned gates: what is cut is chosen once, before a distillation that makes up for it.
"""

import torch
from torch import Tensor, nn

from export.encoders.whisper import Layer, SelfAttention, WhisperEncoder
from export.errors import RecipeError


def narrow(encoder: WhisperEncoder, heads: int, feed_forward: int) -> WhisperEncoder:
    """Cut every layer of an encoder to some heads and hidden units, in place.

    Args:
        encoder: With its pretrained weights.
        heads: Attention heads that are kept; 0 keeps all.
        feed_forward: Hidden units that are kept; 0 keeps all.

    Returns:
        The encoder.

    Raises:
        RecipeError: It has not so many.
    """
    attention, units = encoder.layers[0].self_attn.heads, encoder.layers[0].fc1.out_features
    for name, wanted, there in (("heads", heads, attention), ("feed_forward", feed_forward, units)):
        if not 0 <= wanted <= there:
            raise RecipeError(
                f"encoder.{name} = {wanted}: this encoder has {there}, and 0 keeps all"
            )
    for layer in encoder.layers:
        if heads:
            _cut_heads(layer.self_attn, heads)
        if feed_forward:
            _cut_units(layer, feed_forward)
    return encoder


def _cut_heads(attention: SelfAttention, count: int) -> None:
    """Keep the heads through which most passes: norm of values times norm of what it becomes."""
    values = attention.v_proj.weight.unflatten(0, (attention.heads, -1))  # (H, size, D)
    outputs = attention.out_proj.weight.unflatten(1, (attention.heads, -1))  # (D, H, size)
    passing = values.square().sum(dim=(1, 2)) * outputs.square().sum(dim=(0, 2))
    channels = torch.arange(values.shape[0] * values.shape[1]).unflatten(0, (attention.heads, -1))
    kept = channels[_largest(passing, count)].flatten()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, _rows(getattr(attention, name), kept))
    attention.out_proj = _columns(attention.out_proj, kept)
    attention.heads = count


def _cut_units(layer: Layer, count: int) -> None:
    """Keep the hidden units with the largest product of the norms of what enters and leaves."""
    passing = layer.fc1.weight.square().sum(dim=1) * layer.fc2.weight.square().sum(dim=0)
    kept = _largest(passing, count)
    layer.fc1, layer.fc2 = _rows(layer.fc1, kept), _columns(layer.fc2, kept)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the largest values are, in their order."""
    return values.topk(count).indices.sort().values


def _rows(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    cut = nn.Linear(linear.in_features, len(kept), bias=linear.bias is not None)
    bias = {} if linear.bias is None else {"bias": linear.bias[kept]}
    cut.load_state_dict({"weight": linear.weight[kept], **bias})
    return cut


def _columns(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    cut = nn.Linear(len(kept), linear.out_features)
    cut.load_state_dict({"weight": linear.weight[:, kept], "bias": linear.bias})
    return cut
