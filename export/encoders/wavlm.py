"""The attention of WavLM, written out: torch's own form of it cannot be exported to ONNX."""

from torch import Tensor, nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


class GatedAttention(nn.Module):
    """Self-attention with a gated relative position bias (arXiv 2110.13900, eqs. 5 to 8).

    Args:
        found: The attention of transformers, whose weights it shares.
    """

    def __init__(self, found: WavLMAttention) -> None:
        super().__init__()
        self.found = found

    def forward(
        self, hidden: Tensor, position_bias: Tensor | None = None, **_: object
    ) -> tuple[Tensor, None, Tensor]:
        """Frames ``(N, F, D)`` to frames, and the bias ``(1, H, F, F)`` for the layers above.

        Args:
            hidden: ``(N, F, D)``.
            position_bias: What the lowest layer returned; that layer computes it.
        """
        found, frames = self.found, hidden.shape[1]
        if position_bias is None:
            position_bias = found.compute_bias(frames, frames)[None]
        shape = (found.num_heads, found.head_dim)
        own = hidden.unflatten(-1, shape).transpose(1, 2)  # (N, H, F, size)
        gates = found.gru_rel_pos_linear(own).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid()
        reset, update = gates.split(1, dim=-1)  # (N, H, F, 1)
        gate = reset * (update * found.gru_rel_pos_const - 1.0) + 2.0
        query, key, value = (
            project(hidden).unflatten(-1, shape).transpose(1, 2)
            for project in (found.q_proj, found.k_proj, found.v_proj)
        )
        scores = (query * found.scaling) @ key.transpose(2, 3) + gate * position_bias
        heard = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return found.out_proj(heard), None, position_bias


def write_out(model: nn.Module) -> None:
    """Replace each attention of a WavLM network by one that can be exported, in place."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "attention", None), WavLMAttention):
            module.attention = GatedAttention(module.attention)
