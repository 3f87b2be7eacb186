"""Distillation: a student learns the answers of its teacher on augmented speech, by the clock."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from export.confidence import write_confidence
from export.encoders.whisper import WhisperEncoder, real_frames
from export.model import Classifier, load_classifier, new_classifier
from export.recipe import Distill
from export.spectrogram import hide, warp
from export.speech import Speech
from export.targets import NOT_KNOWN, Targets, masked_cross_entropy, smoothed, soft_loss
from export.teacher import taught_by
from export.train import (
    CHECKPOINT,
    WeightAverage,
    bucketed,
    fast_bfloat16,
    mixed,
    one_cycle,
    save_checkpoint,
    window_logits,
)
from export.views import View, load_views
from export.workers import workers


def stack(arrays: Sequence[npt.NDArray[np.generic]], frames: int) -> tuple[Tensor, Tensor]:
    """Stack arrays (D, F) of any length: float32 (N, D, frames) and real frames (N, 1, frames)."""
    stacked = torch.zeros(len(arrays), len(arrays[0]), frames)
    real = torch.zeros(len(arrays), 1, frames, dtype=torch.bool)
    for row, array in enumerate(arrays):
        stacked[row, :, : array.shape[1]] = torch.from_numpy(array)
        real[row, :, : array.shape[1]] = True
    return stacked, real


def stack_layers(layers: Sequence[npt.NDArray[np.generic]], frames: int) -> Tensor:
    """Stack hidden states (S, F, D) of any length on zeros: float32 (N, S, frames, D)."""
    states, _, dim = layers[0].shape
    stacked = torch.zeros(len(layers), states, frames, dim)
    for row, array in enumerate(layers):
        stacked[row, :, : array.shape[1]] = torch.from_numpy(array)
    return stacked


def distill(
    student: Classifier,
    views: Sequence[View],
    targets: Targets,
    chosen: Sequence[int],
    settings: Distill,
    *,
    seed: int,
    folder: Path,
) -> None:
    """Train a student in place until its time is used up.

    Args:
        student: Holds the averaged weights afterwards.
        views: Of all clips, as `taught_by` returns them.
        targets: Of all clips.
        chosen: The clips to train on, as positions in ``targets``.
        settings: The recipe's.
        seed: Decides all chance; how many steps fit into the time depends on the machine.
        folder: Where each epoch is kept, to go on from.
    """
    by_clip: dict[int, list[View]] = {}
    for view in views:
        by_clip.setdefault(view.clip, []).append(view)
    torch.manual_seed(seed)
    arrays = views[0].arrays
    # Students are of another width than their teachers; these maps are dropped afterwards.
    translate = nn.ModuleDict(
        {
            "frames": nn.Linear(student.encoder.dim, len(arrays["frames"])),
            "embedding": nn.Linear(student.head.embedding_dim, len(arrays["embedding"])),
        }
    )
    if settings.layers:
        translate["layers"] = layer_heads(student.encoder.dim, arrays["layers"])
    parts = nn.ModuleList([student, translate])
    groups = rates(student, translate, settings)
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    average = WeightAverage(student, settings.average)
    weights = label_weights(targets, chosen, settings.balance)
    epoch, spent_s = 0, 0.0
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        parts.load_state_dict(state["parts"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.steps = state["average"], state["steps"]
        epoch, spent_s = state["epoch"], state["spent_s"]
    budget_s = settings.cpu_minutes * 60
    mixing = np.random.default_rng([seed, 1])
    bar = tqdm(desc=folder.name, total=round(budget_s), initial=round(spent_s), unit="s")
    parts.train()
    # Processor time: another process on the machine must not shorten the training.
    started = time.process_time() - spent_s
    while spent_s < budget_s:
        rng = np.random.default_rng([seed, epoch])
        picked = [by_clip[c][rng.integers(len(by_clip[c]))] for c in chosen]
        lengths = np.array([view.arrays["features"].shape[1] for view in picked])
        losses = []
        for batch in bucketed(rng, lengths, settings.batch):
            progress = min(1.0, (time.process_time() - started) / budget_s)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * one_cycle(progress)
            clips = [chosen[i] for i in batch]
            loss = _loss(
                student,
                translate,
                [picked[i] for i in batch],
                smoothed(targets.label[clips], targets.mask[clips], 0.0) * weights[clips, None],
                targets.mask[clips],
                settings,
                mixing,
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 5.0)
            optimizer.step()
            average.update(student)
            losses.append(loss.item())
        epoch, spent_s = epoch + 1, time.process_time() - started
        bar.update(round(spent_s) - bar.n)
        bar.set_postfix(epoch=epoch, loss=f"{np.mean(losses):.3f}")
        state = {"parts": parts.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"average": average.weights, "steps": average.steps}
        save_checkpoint({**state, "epoch": epoch, "spent_s": spent_s}, checkpoint)
    bar.close()
    student.load_state_dict(average.weights, strict=False)
    student.eval()


def label_weights(targets: Targets, chosen: Sequence[int], balance: float) -> Tensor:
    """Return `Targets.weights` of the clips whose labels are known, and 0 for the others."""
    known = [clip for clip in chosen if targets.label[clip] != NOT_KNOWN]
    return targets.weights(known, balance) * (targets.label != NOT_KNOWN)


def rates(student: Classifier, translate: nn.Module, settings: Distill) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, each with its peak ``rate``.

    What is pretrained learns more slowly than what is new.
    """
    whisper = isinstance(student.encoder, WhisperEncoder)
    pretrained = list(student.encoder.layers.parameters()) if whisper else []
    slow = {id(parameter) for parameter in pretrained}
    network = nn.ModuleList([student, translate])
    new = [p for p in network.parameters() if p.requires_grad and id(p) not in slow]
    groups = [{"params": new, "rate": settings.learning_rate}]
    if pretrained:
        groups.append({"params": pretrained, "rate": settings.tuned_rate})
    return groups


def layer_heads(dim: int, layers: npt.NDArray[np.generic]) -> nn.Linear:
    """Return DistilHuBERT's prediction heads (arXiv 2110.01900): a linear map a hidden state.

    Args:
        dim: Width of the student's frames.
        layers: The teacher's hidden states ``(S, F, D)`` of any window.
    """
    return nn.Linear(dim, layers.shape[0] * layers.shape[2])


def layer_loss(found: Tensor, layers: Tensor, real: Tensor) -> Tensor:
    """Return DistilHuBERT's loss: mean absolute difference, and how little alike directions are.

    Args:
        found: What the heads predict, ``(N, S, F, D)``.
        layers: The teacher's states, of the same shape.
        real: Bool ``(N, 1, F)``, true on frames that the teacher has.
    """
    apart = (found - layers).abs().mean(dim=3)  # (N, S, F)
    alike = functional.cosine_similarity(found, layers, dim=3).sigmoid().log()
    return ((apart - alike) * real).sum() / (real.sum() * layers.shape[1])


def _loss(
    student: Classifier,
    translate: nn.ModuleDict,
    views: Sequence[View],
    target: Tensor,
    mask: Tensor,
    settings: Distill,
    rng: np.random.Generator,
) -> Tensor:
    """Return the loss of one batch of windows with target probs ``(N, C)``."""
    heard = [view.arrays["features"] for view in views]
    lengths = torch.tensor([array.shape[1] for array in heard])
    features, _ = stack(heard, int(lengths.max()))
    counts = student.encoder.frames_of(lengths)
    longest = int(counts.max())
    # The student may round lengths up, the teacher down: some last frames have nothing to match.
    frames, matched = stack([view.arrays["frames"] for view in views], longest)
    logits = torch.from_numpy(np.stack([view.arrays["logits"] for view in views]))
    embedding = torch.from_numpy(np.stack([view.arrays["embedding"] for view in views]))
    layers = (
        stack_layers([view.arrays["layers"] for view in views], longest)
        if settings.layers
        else None
    )
    answers = (logits / settings.temperature).softmax(dim=1)
    if settings.mixup:
        share = float(rng.beta(settings.mixup, settings.mixup))
        other = torch.from_numpy(rng.permutation(len(views)))

        def mix(values: Tensor) -> Tensor:
            return mixed(values, other, share)

        features, frames, answers = mix(features), mix(frames), mix(answers)
        embedding, target = mix(embedding), mix(target)
        layers = None if layers is None else mix(layers)
        lengths, counts = lengths.maximum(lengths[other]), counts.maximum(counts[other])
        matched, mask = matched | matched[other], mask | mask[other]
    if settings.warp:
        features = warp(features, rng, settings.warp)
    stretch = round(settings.mask_s * student.encoder.features_hz)
    features = hide(features, rng, settings.mask_mels, stretch)
    real = real_frames(counts, longest)
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
        states = student.encoder.encode(features, lengths)
        got, pooled = student.head(states, real)
        top = states[:, -1]  # (N, F, D)
        near = translate["frames"](top).float().transpose(1, 2)
    found = translate["embedding"](pooled.float())
    soft = soft_loss(got.float(), answers.clamp(min=1e-6).log(), settings.temperature)
    apart = 1 - functional.cosine_similarity(found, embedding).mean()
    local = ((near - frames).square().mean(dim=1, keepdim=True) * matched).sum() / matched.sum()
    hard = masked_cross_entropy(got.float(), target, mask)
    loss = (
        settings.soft * soft
        + settings.frames * local
        + settings.embedding * apart
        + settings.hard * hard
    )
    if layers is not None:
        predicted = translate["layers"](top.float()).unflatten(2, (layers.shape[1], -1))
        loss = loss + settings.layers * layer_loss(predicted.transpose(1, 2), layers, matched)
    return loss


def fit_student(
    speech: Speech,
    weights: Path | None,
    targets: Path,
    chosen: Sequence[int],
    seed: int,
    folder: Path,
) -> None:
    """Train a student on some clips, to ``model.safetensors``; resumes what lies in ``folder``.

    The folder's name is the student's, one of `export.teacher.TEACHERS`.
    """
    settings = speech.recipe.distill
    assert settings  # only recipes with [distill] have this stage
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    student = new_classifier(speech.recipe, weights)
    views = taught_by(folder.name, load_views(targets))
    known = Targets.of(speech, settings.nonspeech)
    more = [*speech.where(speech.unlabelled), *speech.sounds(settings.nonspeech)]
    distill(student, views, known, [*chosen, *more], settings, seed=seed, folder=folder)
    save_file(student.state_dict(), folder / "model.safetensors")


def make_student(
    speech: Speech, weights: Path | None, targets: Path, seed: int, folder: Path
) -> None:
    """The stage: ``model.safetensors`` and ``confidence.json``.

    Args:
        speech: Clips, split and settings.
        weights: Folder of pretrained checkpoints.
        targets: The folder of the teacher's answers.
        seed: Of the training.
        folder: Takes the files, and a folder of checkpoints a student.
    """
    train, validation = speech.where(speech.split.train), speech.where(speech.split.validation)
    settings = speech.recipe.distill
    assert settings  # only recipes with [distill] have this stage
    clips = {"choice": train, **({"refit": train + validation} if settings.refit else {})}
    # Neither waits for the other: where there are two cores, the second student costs no time.
    with workers() as pool:
        for student in [
            pool.submit(fit_student, speech, weights, targets, chosen, seed, folder / name)
            for name, chosen in clips.items()
        ]:
            student.result()
    choice = load_classifier(speech.recipe, weights, folder / "choice" / "model.safetensors")
    logits = window_logits(choice.from_features, load_views(targets), validation, "features")
    write_confidence(speech, speech.split.validation, logits, folder)
    shipped = folder / list(clips)[-1] / "model.safetensors"
    shutil.copyfile(shipped, folder / "model.safetensors")
