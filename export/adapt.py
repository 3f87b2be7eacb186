"""Adaptation to a speaker: histories drawn at random, the network that learns from them, its worth.

What the network sees of a history, and how its shift is applied, is the runtime's own code; here
stand only the draws, the training and the table.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_ser.adaptation import FEATURES, MOST, Adaptation, History
from export import metrics
from export.corpora import Clip
from export.metrics import Floats, Ints
from export.train import one_cycle

KINDS = ("balanced", "skewed", "single")
"""Emotions alike; four fifths of the utterances of one emotion; all of them of one."""

UNITS = 24
COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 30, MOST)
DRAWS = 6  # histories for each clip
SHARES = (0.15, 0.35, 0.5)  # of KINDS: with fewer of the last, a history of one emotion costs more
EPOCHS = 30
BATCH = 256

MEASURED = {"balanced": (1, 2, 5, 10, 20, 50), "skewed": (5, 20, 50), "single": (5, 20)}
REPEATS = 5


def groups_of(clips: Sequence[Clip]) -> list[Ints]:
    """Return for every clip those that its speaker was heard with: same folder, other recording."""
    keys = [(clip.corpus, clip.speaker) for clip in clips]
    places: dict[tuple[str, str], list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [
        np.array([other for other in places[key] if other != place], np.int64)
        for place, key in enumerate(keys)
    ]


def draw_history(
    rng: np.random.Generator, among: Ints, labels: Ints, kind: str, count: int
) -> Ints:
    """Draw earlier utterances of a speaker, each at most once.

    Args:
        rng: Source of chance.
        among: The utterances that there are, as positions.
        labels: Emotion of every position.
        kind: One of `KINDS`; which emotion is the frequent one is drawn.
        count: How many; fewer if there are fewer.

    Returns:
        Positions, at most ``count``.
    """
    if not len(among):
        return among
    emotions, numbers, of_emotion = np.unique(
        labels[among], return_inverse=True, return_counts=True
    )
    if kind == "balanced":
        shares = 1.0 / of_emotion[numbers]
        return rng.choice(among, min(count, len(among)), replace=False, p=shares / shares.sum())
    frequent = numbers == rng.integers(len(emotions))
    most = count if kind == "single" else max(1, round(0.8 * count))
    main = rng.permutation(among[frequent])[:most]
    # Of 20 utterances, 16 and 4; where only 8 are there, 8 and 2.
    rest = 0 if kind == "single" else round(len(main) * (count - most) / most)
    return np.concatenate([main, rng.permutation(among[~frequent])[:rest]])


def parts_of(logits: Floats) -> Floats:
    """Return what each utterance adds to a history, (N, 3, C), from calibrated logits (N, C)."""
    histories = [History.empty(logits.shape[1]) for _ in logits]
    for history, utterance in zip(histories, logits, strict=True):
        history.add(utterance)
    return np.array([[h.logits, h.squares, h.probs] for h in histories])


def history_of(parts: Floats) -> History:
    """Return the history of at most `MOST` utterances, from the parts (U, 3, C) of each."""
    return History(len(parts), *parts.sum(axis=0))


class ShiftNetwork(nn.Module):
    """`edge_ser.adaptation.Adaptation` with weights that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, UNITS)
        self.outer = nn.Linear(UNITS, UNITS)
        self.last = nn.Parameter(torch.zeros(UNITS))
        self.log_half = nn.Parameter(torch.tensor(5.0).log())

    def forward(self, features: Tensor, counts: Tensor) -> Tensor:
        """Features ``(N, C, FEATURES)`` of histories of ``(N,)`` utterances to shifts (N, C)."""
        hidden = torch.tanh(self.outer(torch.tanh(self.inner(features))))
        return hidden @ self.last * (counts / (counts + self.log_half.exp()))[:, None]

    def finish(self) -> Adaptation:
        """Return what the runtime applies."""

        def array(*parts: Tensor) -> Floats:
            return np.vstack([part.detach().double().numpy() for part in parts])

        return Adaptation(
            array(self.inner.weight.T, self.inner.bias),
            array(self.outer.weight.T, self.outer.bias),
            array(self.last)[0],
            half=self.log_half.exp().item(),
        )


def fit_adaptation(
    logits: Floats,
    clips: Sequence[Clip],
    labels: Ints,
    mask: npt.NDArray[np.bool_],
    weights: Floats,
    seed: int = 0,
) -> Adaptation:
    """Train the network on random histories.

    Args:
        logits: Calibrated, of N clips, each by a model that has not heard its speaker, (N, C).
        clips: The N clips.
        labels: What they are, (N,).
        mask: The labels that each clip's corpus has, (N, C).
        weights: How often each clip is drawn, (N,).
        seed: Of all chance.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    among, parts = groups_of(clips), parts_of(logits)
    drawn = rng.choice(len(clips), DRAWS * len(clips), p=weights / weights.sum())
    features = np.zeros((len(drawn), logits.shape[1], FEATURES), np.float32)
    counts = np.zeros(len(drawn), np.float32)
    for row, place in enumerate(drawn):
        kind = rng.choice(KINDS, p=SHARES)
        earlier = draw_history(rng, among[place], labels, kind, int(rng.choice(COUNTS)))
        if len(earlier):
            features[row] = history_of(parts[earlier]).features()
            counts[row] = len(earlier)
    seen, number = torch.from_numpy(features), torch.from_numpy(counts)
    plain = torch.from_numpy(logits[drawn]).float()
    absent, label = torch.from_numpy(~mask[drawn]), torch.from_numpy(labels[drawn])
    network = ShiftNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(drawn)).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * one_cycle(epoch / EPOCHS)
            shifted = plain[batch] + network(seen[batch], number[batch])
            loss = functional.cross_entropy(shifted.masked_fill(absent[batch], -1e4), label[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.finish()


def adapted(
    logits: Floats,
    adaptations: Sequence[Adaptation],
    among: Sequence[Ints],
    labels: Ints,
    kind: str,
    count: int,
    seed: int,
) -> Floats:
    """Answer every clip after as many earlier utterances of its speaker.

    Args:
        logits: Calibrated, (N, C).
        adaptations: The network of each of the N clips: one that has not heard its speaker.
        among: `groups_of` the clips.
        labels: (N,).
        kind: One of `KINDS`.
        count: Earlier utterances.
        seed: Of the draws.

    Returns:
        Calibrated logits, (N, C).
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), count])
    shifted, parts = logits.copy(), parts_of(logits)
    for place, adaptation in enumerate(adaptations):
        earlier = draw_history(rng, among[place], labels, kind, count)
        if len(earlier):
            shifted[place] += adaptation.shift(history_of(parts[earlier]))
    return shifted


def measure(
    logits: Floats,
    adaptations: Sequence[Adaptation],
    clips: Sequence[Clip],
    labels: Ints,
    mask: npt.NDArray[np.bool_],
    classes: int,
) -> list[dict[str, Any]]:
    """Return UA after histories of every kind and length: one row each, the first without any.

    Args:
        logits: Calibrated, (N, C).
        adaptations: As `adapted` takes them.
        clips: The N clips, one folder a recording; `splits.pooled` chooses such.
        labels: (N,).
        mask: The labels that each clip's corpus has, (N, C).
        classes: C.

    Returns:
        Rows of ``history``, ``utterances``, ``pooled_ua`` and ``masked_ua`` by corpus, means of
        `REPEATS` draws, and of the first draw the ``gain`` of pooled UA with its interval.
    """
    among = groups_of(clips)
    corpora = np.array([clip.corpus for clip in clips])
    speakers = [clip.speaker_key for clip in clips]
    before = logits.argmax(axis=1)

    def ua(predicted: Ints, chosen: npt.NDArray[np.bool_]) -> float:
        return float(metrics.ua(metrics.confusion(labels[chosen], predicted[chosen], classes)))

    def row(kind: str, count: int, answers: Sequence[Floats]) -> dict[str, Any]:
        everywhere = np.ones(len(clips), bool)
        return {
            "history": kind,
            "utterances": count,
            "pooled_ua": float(np.mean([ua(a.argmax(axis=1), everywhere) for a in answers])),
            "masked_ua": {
                name: float(
                    np.mean([ua(metrics.masked_argmax(a, mask), corpora == name) for a in answers])
                )
                for name in dict.fromkeys(corpora.tolist())
            },
        }

    rows = [row("none", 0, [logits])]
    for kind, counts in MEASURED.items():
        for count in counts:
            answers = [
                adapted(logits, adaptations, among, labels, kind, count, seed)
                for seed in range(REPEATS)
            ]
            gain = metrics.ua_difference(
                labels, answers[0].argmax(axis=1), before, classes, speakers, corpora.tolist()
            )
            rows.append({**row(kind, count, answers), "gain": asdict(gain)})
    return rows
