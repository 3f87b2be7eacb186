"""What the clips are, as tensors, and the loss of an answer against it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from export.speech import Speech

NONSPEECH, NOT_KNOWN = -1, -2
"""In place of a label: what is no speech, and speech that is heard without its label."""


@dataclass(frozen=True)
class Targets:
    """What the clips are, as tensors.

    Attributes:
        label: int64 ``(N,)``; or `NONSPEECH` or `NOT_KNOWN`.
        mask: The labels that the clip's corpus has, bool ``(N, C)``.
        group: Number of the clip's corpus and label, int64 ``(N,)``.
    """

    label: Tensor
    mask: Tensor
    group: Tensor

    @classmethod
    def of(cls, speech: Speech, nonspeech: int = 0) -> "Targets":
        """Read them off all clips of a recipe, those without labels, and so many sounds."""
        masks = np.stack([speech.masks[clip.corpus] for clip in speech.clips])
        labels = [speech.labels.index(clip.emotion) for clip in speech.clips]
        pairs = [(clip.corpus, clip.emotion) for clip in speech.clips]
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        unknown = len(speech.unlabelled)
        more = [len(numbers)] * unknown + [len(numbers) + 1] * nonspeech
        groups = torch.tensor([numbers[pair] for pair in pairs] + more)
        label = torch.tensor(labels + [NOT_KNOWN] * unknown + [NONSPEECH] * nonspeech)
        every = torch.ones(unknown + nonspeech, masks.shape[1], dtype=torch.bool)
        mask = torch.cat([torch.from_numpy(masks), every])
        return cls(label, mask, groups)

    def weights(self, chosen: Sequence[int], balance: float) -> Tensor:
        """Return the weight of every clip in the loss, ``(N,)``.

        Args:
            chosen: The clips to train on; their weights have mean 1.
            balance: 0 weighs clips alike, 1 weighs every label of every corpus alike; between, the
                weight is the number of such clips to the power of ``-balance``.
        """
        counts = torch.bincount(self.group[list(chosen)], minlength=int(self.group.max()) + 1)
        weights = counts.clamp(min=1)[self.group].double() ** -balance
        return (weights / weights[list(chosen)].mean()).float()


def smoothed(label: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Return target probs ``(N, C)``: the label, smoothed over the labels of its corpus.

    What is no speech gets all labels alike.
    """
    one_hot = functional.one_hot(label.clamp(min=0), mask.shape[1]).float()
    share = torch.where(label < 0, 1.0, smoothing)[:, None]
    return one_hot * (1 - share) + share * mask / mask.sum(dim=1, keepdim=True)


def mean_answer(answers: Sequence[Tensor]) -> Tensor:
    """Return logits ``(N, C)`` whose probs are the geometric mean of those of several networks."""
    if len(answers) == 1:
        return answers[0]
    return torch.stack([logits.log_softmax(dim=1) for logits in answers]).mean(dim=0)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the divergence of softened answers (arXiv 1503.02531), both ``(N, C)``.

    Args:
        student: Logits.
        teacher: Log-probs at the same temperature.
        temperature: T.
    """
    answers = (student / temperature).log_softmax(dim=1)
    divergence = functional.kl_div(answers, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def masked_cross_entropy(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that each clip's corpus has.

    Corpora that lack a label say nothing about it: its logit gets no gradient from their clips.
    """
    return -(target * logits.masked_fill(~mask, -1e4).log_softmax(dim=1)).sum(dim=1).mean()
