"""Ridge regression in closed form, added to the trained linear probe of a head.

A probe that is trained by gradients knows its training speakers too well; ridge regression of the
same statistics errs elsewhere than the convolutions do. Their log-probs are summed, and as both
probes are linear in the same input, the sum is one probe: it costs nothing when it runs.

The lowest states help it, and hurt where gradients see them as well, for then both err alike:
pooled UA of speakers that were not heard (recipe ``default``, four folds, seed 0, ridge of clips as
recorded alone) was .723 with three states for both, .713 with five for both, .733 with five for
ridge alone.

Augmented views are for the probe what they are for the convolutions. Where it was fitted to clips
as recorded alone, the telephone band changed 21 % of the answers to validation speakers and faint
noise 25 %; with augmented views 14 and 17 %, at the same accuracy (fold 0, one head, seed 0).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from export.corpora import Clip
from export.heads import CnnHead, normalised, probed
from export.splits import folds, speakers
from export.targets import Targets, masked_cross_entropy, smoothed
from export.views import View

FOLDS = 3
SHARE = 0.5  # of the sharpness that it would have alone
SHARPEST = 30.0  # a multiple of what was ever found

Floats = npt.NDArray[np.float64]


def solve(inputs: Tensor, target: Tensor, weights: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return weight ``(C, D)`` and bias ``(C,)`` of a weighted ridge regression.

    The inputs are standardised for it, and the result is for them as they are. The bias is free.

    Args:
        inputs: ``(N, D)``, of one type with all others.
        target: ``(N, C)``.
        weights: ``(N,)``: a row of weight 2 counts as two rows.
        alpha: Penalty of the squared weights.
    """
    spread, mean = torch.std_mean(inputs, dim=0, correction=0)
    scaled = (inputs - mean) / (spread + 1e-9)
    share = weights / weights.sum()
    centre, level = share @ scaled, share @ target
    scaled = scaled - centre
    normal = scaled.T @ (weights[:, None] * scaled)
    normal.diagonal().add_(alpha)
    found = torch.linalg.solve(normal, scaled.T @ (weights[:, None] * (target - level)))  # (D, C)
    weight = found.T / (spread + 1e-9)
    return weight, level - centre @ found - weight @ mean


@torch.no_grad()
def add_ridge(
    head: CnnHead,
    views: Sequence[View],
    clips: Sequence[Clip],
    targets: Targets,
    chosen: Sequence[int],
    *,
    alpha: float,
    balance: float,
) -> float:
    """Fit ridge regression to what the probe of a trained head sees, and add it to the probe.

    How sharp its answers become, the factor that makes logits of them, is half of what predicts the
    clips of held-out speakers best, by three folds over those chosen: the head has told its own
    share already. Out of fold, halves and wholes differ by less than a point of pooled UA, but
    wholes are too sure.

    Args:
        head: Trained; its probe is changed.
        views: Of all clips, with ``states``. The augmented ones of a clip weigh together as much as
            the clip as recorded.
        clips: All clips, for their speakers.
        targets: Of all clips.
        chosen: The clips that the head was trained on, and the sounds that are no speech.
        alpha: Penalty of the squared weights.
        balance: As the head was trained with.

    Returns:
        The factor.
    """
    among = set(chosen)
    heard = [view for view in views if view.clip in among]
    rows = torch.tensor([view.clip for view in heard])
    inputs = torch.cat([_inputs(view) for view in heard])
    copies = Counter(view.clip for view in heard if view.number)
    shares = [1 / copies[view.clip] if view.number else 1.0 for view in heard]
    weights = targets.weights(chosen, balance)[rows] * torch.tensor(shares)
    weights *= len(among) / weights.sum()  # what the penalty is worth does not hang on the copies
    mask, label = targets.mask[rows], targets.label[rows]
    target = smoothed(label, mask, 0.0)
    spoken = label >= 0
    of_rows = [clips[row] for row in rows[spoken].tolist()]
    fold = torch.full_like(rows, -1)  # sounds have no speaker to be held out
    fold[spoken] = torch.from_numpy(folds(of_rows, min(FOLDS, len(speakers(of_rows))), 0))
    held_out = torch.zeros_like(target)
    for number in fold[spoken].unique():
        out = fold == number
        weight, bias = solve(inputs[~out], target[~out], weights[~out], alpha)
        held_out[out] = inputs[out] @ weight.T + bias
    asked, right = held_out[spoken], target[spoken] * weights[spoken, None]

    def loss(factor: float) -> float:
        return masked_cross_entropy(factor * asked, right, mask[spoken]).item()

    found = minimize_scalar(loss, bounds=(0.0, SHARPEST), method="bounded")
    factor = SHARE * float(found.x)
    weight, bias = solve(inputs, target, weights, alpha)
    head.probe.weight += factor * weight
    head.probe.bias += factor * bias
    return factor


def _inputs(view: View) -> Tensor:
    """Return what a probe sees of a view, float32 ``(1, S * 2 D)``."""
    return probed(normalised(torch.from_numpy(view.arrays["states"]).float()[None]))
