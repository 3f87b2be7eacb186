"""Training of a head, and of the layers below it, on cached hidden states."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from export.heads import CnnHead
from export.model import new_classifier, trained_part
from export.recipe import Train
from export.ridge import add_ridge
from export.speech import Speech
from export.targets import Targets, masked_cross_entropy, smoothed
from export.tune import TunedHead, parameter_groups
from export.views import View

CHECKPOINT = "checkpoint.pt"
SHORTEST_S = 0.4  # what the runtime refuses to go below
CLIP = 1.0  # largest norm of a gradient


def one_cycle(progress: float, rise: float = 0.05) -> float:
    """Return the share of the peak learning rate at 0 to 1 of the training: up, then a cosine."""
    if progress < rise:
        return max(progress, 1e-3) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - rise) / (1 - rise))))


def schedule(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Set the learning rates at 0 to 1 of the training; what has not started yet is not trained."""
    for group in optimizer.param_groups:
        learns = progress >= group["start"]
        for parameter in group["params"]:
            parameter.requires_grad_(learns)
        elapsed = (progress - group["start"]) / (1 - group["start"])
        group["lr"] = group["rate"] * one_cycle(elapsed) if learns else 0.0


class WeightAverage:
    """Exponential moving average of the parameters of a network (Polyak and Juditsky, 1992).

    The decay rises from 0, so that the first, random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters of one more step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, parameter in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter, 1 - decay)


def bucketed(
    rng: np.random.Generator, lengths: npt.NDArray[np.int64], batch: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield shuffled batches of indices whose clips are of similar length, to pad little."""
    order = rng.permutation(len(lengths))
    pools = np.array_split(order, max(1, len(order) // (batch * 8)))
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def train_head(
    head: CnnHead | TunedHead,
    views: Sequence[View],
    targets: Targets,
    chosen: Sequence[int],
    settings: Train,
    *,
    seed: int,
    folder: Path | None = None,
) -> None:
    """Train a head, or a `TunedHead`, in place.

    Args:
        head: Untrained; holds the averaged weights afterwards. It sees its ``upper`` states.
        views: Of all clips, with ``states`` (S, F, D) float16.
        targets: Of all clips.
        chosen: The clips to train on, as positions in ``targets``.
        settings: The recipe's.
        seed: Decides all chance; every epoch has its own generator, so that a resumed training
            equals one that never stopped.
        folder: Where each epoch is kept, to go on from; not kept without it.
    """
    clean: dict[int, list[View]] = {}
    augmented: dict[int, list[View]] = {}
    for view in views:
        (augmented if view.number else clean).setdefault(view.clip, []).append(view)
    optimizer = torch.optim.AdamW(
        parameter_groups(head, settings), weight_decay=settings.weight_decay
    )
    average = WeightAverage(head, settings.average)
    weights = targets.weights(chosen, settings.balance)
    shortest = round(SHORTEST_S * (TunedHead.frame_rate_hz if settings.tuned else 25))
    first = 0
    checkpoint = folder / CHECKPOINT if folder else None
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.steps = state["average"], state["steps"]
        first = state["epoch"] + 1
    head.train()
    for epoch in tqdm(range(first, settings.epochs), initial=first, total=settings.epochs):
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        picked = [
            _pick(rng, clean[c], augmented.get(c), settings.clean, shortest)[-head.upper :]
            for c in chosen
        ]
        lengths = np.array([states.shape[1] for states in picked])
        batches = list(bucketed(rng, lengths, settings.batch))
        for step, batch in enumerate(batches):
            schedule(optimizer, (epoch + step / len(batches)) / settings.epochs)
            states, real = pad([picked[i] for i in batch])
            clips = [chosen[i] for i in batch]
            label, mask = targets.label[clips], targets.mask[clips]
            target = smoothed(label, mask, settings.label_smoothing) * weights[clips, None]
            if settings.mixup:
                share = float(rng.beta(settings.mixup, settings.mixup))
                other = torch.from_numpy(rng.permutation(len(batch)))
                states, target = mixed(states, other, share), mixed(target, other, share)
                real, mask = real | real[other], mask | mask[other]
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                logits, _ = head(states, real)
            loss = masked_cross_entropy(logits.float(), target, mask)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), CLIP)
            optimizer.step()
            average.update(head)
        if checkpoint:
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average.weights, "steps": average.steps, "epoch": epoch}
            save_checkpoint(state, checkpoint)
    head.load_state_dict(average.weights, strict=False)
    head.eval()


def _pick(
    rng: np.random.Generator,
    clean: list[View],
    augmented: list[View] | None,
    share: float,
    shortest: int,
) -> Tensor:
    """Draw one window of a clip and a part of it: states (S, F, D)."""
    among = clean if augmented is None or rng.random() < share else augmented
    states = torch.from_numpy(among[rng.integers(len(among))].arrays["states"])
    frames = states.shape[1]
    keep = max(min(frames, shortest), round(frames * rng.uniform(0.7, 1.0)))
    start = int(rng.integers(frames - keep, endpoint=True))
    return states[:, start : start + keep]


def pad(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack states (S, F, D) of any length: float32 (N, S, F, D) and real frames (N, 1, F)."""
    frames = max(s.shape[1] for s in states)
    shape = (len(states), states[0].shape[0], frames, states[0].shape[2])
    stacked, real = torch.zeros(shape), torch.zeros(len(states), 1, frames, dtype=torch.bool)
    for row, s in enumerate(states):
        stacked[row, :, : s.shape[1]] = s
        real[row, :, : s.shape[1]] = True
    return stacked, real


def mixed(values: Tensor, other: Tensor, share: float) -> Tensor:
    """Return rows mixed with ``other`` rows, of which ``1 - share`` is taken (arXiv 1710.09412)."""
    return torch.lerp(values[other], values, share)


def fast_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 natively; else it would be slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def save_checkpoint(state: dict[str, object], file: Path) -> None:
    """Write a checkpoint whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(file)


@torch.no_grad()
def window_logits(
    network: Callable[[Tensor], tuple[Tensor, Tensor]],
    views: Sequence[View],
    clips: Sequence[int],
    array: str = "states",
) -> list[npt.NDArray[np.float32]]:
    """Return the logits (W, C) of the runtime's windows of each clip, as recorded.

    Args:
        network: A head, or a student behind its front end; gives logits and embedding.
        views: Of all clips.
        clips: Which clips, in this order.
        array: What of a view the network takes: ``states``, or a student's ``features``.
    """
    found: dict[int, list[npt.NDArray[np.float32]]] = {clip: [] for clip in clips}
    for view in views:
        if view.number == 0 and view.clip in found:
            taken = torch.from_numpy(view.arrays[array]).float()
            found[view.clip].append(network(taken[None])[0].numpy())
    return [np.concatenate(found[clip]) for clip in clips]


def fit_member(
    speech: Speech,
    weights: Path | None,
    views: Sequence[View],
    chosen: Sequence[int],
    seed: int,
    folder: Path,
    number: int,
) -> CnnHead | TunedHead:
    """Train one member of what a recipe trains; as `fit_head`, of which it is a part.

    Args:
        speech: Clips and settings.
        weights: Folder of pretrained checkpoints.
        views: Of all clips.
        chosen: The clips to train on.
        seed: Of the training: member m of M has the chance of the single head of seed M * seed + m.
        folder: Takes a folder with the last epoch; where all are done, that is what is returned.
        number: Of the member.
    """
    recipe = speech.recipe
    settings, own = recipe.train, folder / f"member{number}"
    assert settings  # only recipes with [train] have this stage
    own.mkdir(parents=True, exist_ok=True)
    seed = recipe.head.members * seed + number
    single = replace(recipe, head=replace(recipe.head, members=1))
    torch.manual_seed(seed)
    member = trained_part(single, new_classifier(single, weights))
    assert isinstance(member, CnnHead | TunedHead)  # as of all recipes with [train]
    targets = Targets.of(speech, settings.nonspeech)
    every = [*chosen, *speech.sounds(settings.nonspeech)]
    train_head(member, views, targets, every, settings, seed=seed, folder=own)
    return member


def fit_head(
    speech: Speech,
    weights: Path | None,
    views: Sequence[View],
    chosen: Sequence[int],
    seed: int,
    folder: Path,
) -> nn.Module:
    """Train what a recipe trains on some clips; resumes what lies in ``folder``.

    Args:
        speech: Clips and settings.
        weights: Folder of pretrained checkpoints.
        views: Of all clips.
        chosen: The clips to train on.
        seed: Of the training.
        folder: Takes ``model.safetensors``, and a folder a member.

    Returns:
        `export.model.trained_part` of the network, in evaluation mode.
    """
    recipe = speech.recipe
    settings = recipe.train
    assert settings  # only recipes with [train] have this stage
    network = trained_part(recipe, new_classifier(recipe, weights)).eval()
    finished = folder / "model.safetensors"
    if finished.exists():
        network.load_state_dict(load_file(finished))
        return network
    members = [
        fit_member(speech, weights, views, chosen, seed, folder, number)
        for number in range(recipe.head.members)
    ]
    if isinstance(network, CnnHead):
        network.join(members)
    else:  # layers that are tuned have one head
        (network,) = members
    if settings.ridge:
        assert isinstance(network, CnnHead)  # a recipe with both is refused
        targets = Targets.of(speech, settings.nonspeech)
        every = [*chosen, *speech.sounds(settings.nonspeech)]
        factor = add_ridge(
            network, views, speech.clips, targets, every,
            alpha=settings.ridge, balance=settings.balance,
        )  # fmt: skip
        tqdm.write(f"ridge: added to the probe, times {factor:.1f}")
    save_file(network.state_dict(), finished)
    return network
