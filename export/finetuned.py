"""A user's own network: a checkpoint of transformers that was fine-tuned to classify speech.

``Wav2Vec2ForSequenceClassification``, its kin of HuBERT and WavLM, and
``WhisperForAudioClassification`` have one head: hidden states, the last or a weighted sum of all,
are projected, averaged over time and classified.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForAudioClassification

from export.checkpoint import EXTRACTOR, fill, locate, read_config, read_tensors
from export.encoders.wav2vec2 import KINDS, fill_encoder, hears_normalised, normalised, read
from export.encoders.whisper import Neighbours, WhisperEncoder, made_here
from export.errors import RecipeError
from export.speech import RATE_HZ

WHISPER_S = 30  # what Whisper hears, silence behind the speech included
FORMS = ("Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification",
         "WavLMForSequenceClassification", "WhisperForAudioClassification")  # fmt: skip


class FineTuned(nn.Module):
    """Samples to logits and embedding.

    Args:
        encoder: Samples ``(N, T)`` to its last hidden state ``(N, F, D)``, and the list of those
            that are weighted.
        projector: Of each frame.
        classifier: Of the mean over time.
        layer_weights: Of each of that list, before the softmax; without them the last one counts.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Linear,
        classifier: nn.Linear,
        layer_weights: Tensor | None,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.classifier = encoder, projector, classifier
        self.layer_weights = None if layer_weights is None else nn.Parameter(layer_weights)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 samples ``(N, T)`` to logits ``(N, C)`` and embedding ``(N, D)``."""
        frames, states = self.encoder(samples)
        if self.layer_weights is not None:
            shares = self.layer_weights.softmax(dim=0)
            frames = sum(share * state for share, state in zip(shares, states, strict=True))
        embedding = self.projector(frames).mean(dim=1)
        return self.classifier(embedding), embedding


class _States(nn.Module):
    """The hidden states of Wav2Vec2 or its kin.

    The list is that of the transformers that is installed, as is what it weighs: where the last
    state has a norm of its own, version 4.57 lists it behind the norm, 5 before it.
    """

    def __init__(self, model: nn.Module, hears: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.model, self.hears = model, hears

    def forward(self, samples: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        heard = self.hears(samples) if self.hears else samples
        found = self.model(heard, output_hidden_states=True)
        return found.last_hidden_state, found.hidden_states


class _WhisperStates(WhisperEncoder):
    """All hidden states of Whisper.

    Args:
        config: The checkpoint's ``config.json``.
        window_s: Longest input in seconds.
        padded: Whether silence is added up to the 30 s that Whisper was trained on.
    """

    def __init__(self, config: dict, window_s: float, padded: bool) -> None:
        longest = WHISPER_S if padded else window_s
        super().__init__(config, config["encoder_layers"], longest, states=1)
        self.padded = padded
        self.layer_norm = nn.LayerNorm(self.dim)

    def forward(self, samples: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.padded:
            samples = functional.pad(samples, (0, WHISPER_S * RATE_HZ - samples.shape[1]))
        found = [self.below(samples, 0)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        found[-1] = self.layer_norm(found[-1])
        return found[-1], found


def load_finetuned(source: str, window_s: float, padded: bool) -> tuple[FineTuned, tuple[str, ...]]:
    """Load a network with all of its weights, and its labels in the order of the logits.

    Args:
        source: A folder or a hub id.
        window_s: Longest window in seconds.
        padded: Of Whisper: whether windows are filled up with silence to 30 s, as in training. The
            answers are then those of transformers; without it each window is heard as long as it
            is, which takes a fraction of the time.

    Returns:
        The network, in evaluation mode, and the labels.

    Raises:
        RecipeError: The checkpoint cannot be read, is of another form, hears another rate, or lacks
            a tensor.
    """
    folder = locate(source)
    config = read_config(folder)
    form = next(iter(config.get("architectures") or [None]))
    if form not in FORMS:
        raise RecipeError(f"checkpoint {source!r} is a {form}; allowed are {', '.join(FORMS)}")
    extractor = folder / EXTRACTOR
    rate_hz = json.loads(extractor.read_text()).get("sampling_rate") if extractor.exists() else None
    if rate_hz not in (None, RATE_HZ):
        raise RecipeError(f"checkpoint {source!r} hears {rate_hz} Hz; allowed is {RATE_HZ}")
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers has it
    labels = tuple(names[str(place)] for place in range(len(names)))
    if config["model_type"] in KINDS:
        return _wav2vec2(folder, source).eval(), labels
    return _whisper(folder, source, config, len(labels), window_s, padded).eval(), labels


def _wav2vec2(folder: Path, source: str) -> FineTuned:
    whole = AutoModelForAudioClassification.from_config(
        read(folder, source), attn_implementation="eager"
    )
    fill_encoder(whole, read_tensors(folder), source)
    states = _States(
        getattr(whole, whole.base_model_prefix), normalised if hears_normalised(folder) else None
    )
    weights = getattr(whole, "layer_weights", None)
    return FineTuned(states, whole.projector, whole.classifier, weights)


def _whisper(
    folder: Path, source: str, config: dict, labels: int, window_s: float, padded: bool
) -> FineTuned:
    encoder = _WhisperStates(config, window_s, padded)
    size = config.get("classifier_proj_size", 256)
    weighted = (
        torch.zeros(len(encoder.layers) + 1) if config.get("use_weighted_layer_sum") else None
    )
    network = FineTuned(encoder, nn.Linear(encoder.dim, size), nn.Linear(size, labels), weighted)
    tensors = read_tensors(folder)
    for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
        if name in tensors:
            tensors[name] = Neighbours.from_kernel(tensors[name])
    place = "encoder.embed_positions.weight"
    if place in tensors:
        tensors[place] = tensors[place][: encoder.embed_positions.num_embeddings]
    fill(network, tensors, source, [f"encoder.{name}" for name in made_here(encoder)])
    return network
