"""A network of the size of wav2vec2-base that has learned from speech, where none can be fetched.

Random weights answer alike whatever they hear, so what quantization does to them says little. Here
a wav2vec2-base is taught, from random weights and for a while, what the layers of a pretrained
Whisper make of the same speech: feature matching as in DistilHuBERT (arXiv 2110.01900), whose loss
this is. With it the head learns the labels of the clips.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForAudioClassification, Wav2Vec2Config, Wav2Vec2FeatureExtractor

from benchmarks import machine
from benchmarks.prepare import CALIBRATION
from export import metrics
from export.checkpoint import locate
from export.conditions import of_length, spread_over
from export.corpora import Clip, read_samples
from export.encoders.wav2vec2 import normalised
from export.encoders.whisper import WhisperEncoder, load_whisper, read_checkpoint
from export.errors import RecipeError
from export.recipe_file import read_recipe
from export.speech import RATE_HZ, Speech
from export.stage import run_stage
from export.train import CHECKPOINT, fast_bfloat16, one_cycle, save_checkpoint

PACKAGES = ("numpy", "torch", "transformers")

BATCH, WINDOW_S = 16, 2.0
RATE, BETAS, LONGEST_STEP = 3e-4, (0.9, 0.98), 1.0
KEPT_EVERY_S = 300.0
THIRDS = 3
"""As many layers of either network are compared, evenly up to the last."""

COMPARED, COMPARED_S = 40, 7.0
"""Windows of validation speakers that `benchmarks.peers` is to compare answers on."""

MATCHED = "wav2vec2_matched"

Samples = NDArray[np.float32]


class Matching(nn.Module):
    """The network, and what turns its hidden states into the teacher's.

    Args:
        student: A classifier of transformers.
        teacher: Whose layers it learns.

    Attributes:
        layers: Of the student that are compared, counted from 1.
        taught: The same of the teacher.
    """

    def __init__(self, student: nn.Module, teacher: WhisperEncoder) -> None:
        super().__init__()
        self.student, every = student, student.config.num_hidden_layers
        self.layers = [every * n // THIRDS for n in range(1, THIRDS + 1)]
        self.taught = [len(teacher.layers) * n // THIRDS for n in range(1, THIRDS + 1)]
        self.translate = nn.ModuleList(
            nn.Linear(student.config.hidden_size, teacher.dim) for _ in self.layers
        )

    def forward(self, samples: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Float32 samples ``(N, T)`` to logits ``(N, C)`` and a state ``(N, F, D)`` a layer."""
        found = self.student(normalised(samples), output_hidden_states=True)
        states = zip(self.translate, self.layers, strict=True)
        return found.logits, [linear(found.hidden_states[layer]) for linear, layer in states]


class Teacher:
    """Hidden states of a Whisper encoder, each channel with mean 0 and variance 1.

    Without that the cosine of any two states is near 1: a few channels are large in all of them.

    Args:
        encoder: With all of its layers.
        layers: The states that are returned, counted from 1.
        windows: Speech that mean and variance are taken from, float32 (T,) each.
    """

    def __init__(
        self, encoder: WhisperEncoder, layers: Sequence[int], windows: Sequence[Samples]
    ) -> None:
        self.encoder, self.layers = encoder, layers
        self.moments: list[tuple[Tensor, Tensor]] = [(torch.zeros(1), torch.ones(1))] * len(layers)
        heard = [self(torch.from_numpy(window)[None]) for window in windows]
        frames = [torch.cat([state[0] for state in states]) for states in zip(*heard, strict=True)]
        self.moments = [(state.mean(dim=0), state.std(dim=0)) for state in frames]

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> list[Tensor]:
        """Float32 samples ``(N, T)`` to a state ``(N, F, D)`` a layer, 50 frames a second."""
        hidden, found = self.encoder.below(samples, 0), []
        for number, layer in enumerate(self.encoder.layers, start=1):
            hidden = layer(hidden)
            if number in self.layers:
                found.append(hidden)
        states = zip(found, self.moments, strict=True)
        return [(state - mean) / spread for state, (mean, spread) in states]


def match(
    path: Path,
    corpora: Path,
    weights: Path | None,
    out: Path,
    cpu_minutes: float,
    size: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Teach the network, and write what `benchmarks.peers` asks for.

    Args:
        path: A recipe whose encoder is a Whisper; says which speakers train and which validate.
        corpora: Folder of the corpora.
        weights: Folder of pretrained checkpoints.
        out: Takes ``wav2vec2_matched`` as transformers saves one, and in ``speech`` calibration
            clips with a manifest, and ``clips`` of `COMPARED_S` of the validation speakers, each
            of clips of one speaker and emotion, joined.
        cpu_minutes: Processor time of the training.
        size: What differs from wav2vec2-base.
        seed: Of weights and windows; how many steps fit into the time depends on the machine.

    Returns:
        What is kept as ``matching.json``: ``steps``, ``windows`` heard, and for the validation
        speakers the mean ``cosine`` of the frames of each layer and the ``ua`` over all labels,
        before and after.

    Raises:
        RecipeError: The recipe's encoder is no Whisper, or its checkpoint cannot be read.
    """
    speech = Speech(read_recipe(path), corpora)
    family = speech.recipe.encoder.family
    if family != "whisper":
        raise RecipeError(f"{path}: its encoder is {family!r}; only 'whisper' can be the teacher")
    settings = {"cpu_minutes": cpu_minutes, "size": size or {}, "seed": seed}
    heard = {"speech": speech.key, "split": speech.recipe.data}
    reads = {**settings, **heard, "encoder": speech.recipe.encoder}
    run_stage(out / MATCHED, reads, partial(_teach, speech, weights, settings))
    run_stage(out / "speech", heard, partial(_write_speech, speech))
    return dict(json.loads((out / MATCHED / "matching.json").read_text()))


def _teach(speech: Speech, weights: Path | None, settings: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(settings["seed"])
    source = str(locate(speech.recipe.encoder.source, weights))
    depth = read_checkpoint(source)[0]["encoder_layers"]
    longest_s = max(WINDOW_S, speech.recipe.windows.window_s)
    encoder = load_whisper(source, depth, longest_s, states=1)
    names = dict(enumerate(speech.labels))
    config = Wav2Vec2Config(
        id2label=names, label2id={name: n for n, name in names.items()}, **settings["size"]
    )
    # In evaluation mode: no part of it is dropped or masked, in so short a time nothing overfits.
    student = AutoModelForAudioClassification.from_config(config, attn_implementation="eager")
    matching = Matching(student, encoder).eval()
    teacher = Teacher(encoder, matching.taught, speech.first_windows(speech.split.calibration))
    asked = of_length(spread_over(speech.split.validation, 100), WINDOW_S, RATE_HZ)
    before = _scores(matching, teacher, asked, speech.labels)
    steps = _train(matching, teacher, speech, settings, folder)
    after = _scores(matching, teacher, asked, speech.labels)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    matching.student.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    said = {
        "command": f"python -m benchmarks match {speech.recipe.name}.toml",
        **machine.provenance(PACKAGES),
        **settings,
        "steps": steps,
        "windows": steps * BATCH,
        "layers": matching.layers,
        "taught": matching.taught,
        "before": before,
        "after": after,
    }
    (folder / "matching.json").write_text(json.dumps(said, indent=1) + "\n")


def _train(
    matching: Matching, teacher: Teacher, speech: Speech, settings: dict[str, Any], folder: Path
) -> int:
    optimizer = torch.optim.AdamW(matching.parameters(), RATE, BETAS, fused=True)
    steps, spent_s, checkpoint = 0, 0.0, folder / CHECKPOINT
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        matching.load_state_dict(state["matching"])
        optimizer.load_state_dict(state["optimizer"])
        steps, spent_s = state["steps"], state["spent_s"]
    budget_s = settings["cpu_minutes"] * 60
    kept_s = spent_s
    bar = tqdm(desc="matching", total=round(budget_s), initial=round(spent_s), unit="s")
    # Processor time: another process on the machine must not shorten the training.
    started = time.process_time() - spent_s
    while spent_s < budget_s:
        for group in optimizer.param_groups:
            group["lr"] = RATE * one_cycle(spent_s / budget_s, rise=0.1)
        samples, labels = _draw(speech, np.random.default_rng([settings["seed"], steps]))
        taught = teacher(samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            logits, states = matching(samples)
        loss = sum(distance(a, b) for a, b in zip(states, taught, strict=True)) / THIRDS
        loss = loss + functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(matching.parameters(), LONGEST_STEP)
        optimizer.step()
        steps, spent_s = steps + 1, time.process_time() - started
        bar.update(round(spent_s) - bar.n)
        bar.set_postfix(steps=steps, loss=f"{loss.item():.3f}")
        if spent_s - kept_s > KEPT_EVERY_S:
            kept_s = spent_s
            state = {"matching": matching.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint({**state, "steps": steps, "spent_s": spent_s}, checkpoint)
    bar.close()
    return steps


def distance(states: Tensor, taught: Tensor) -> Tensor:
    """Return the loss of DistilHuBERT: mean L1 less the log of the sigmoid of the cosine.

    Args:
        states: ``(N, F, D)``.
        taught: The same of the teacher; one frame more or less is left out.
    """
    states, taught = _paired(states, taught)
    cosine = functional.cosine_similarity(states, taught, dim=2)
    return functional.l1_loss(states, taught) - functional.logsigmoid(cosine).mean()


def _paired(states: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
    frames = min(states.shape[1], taught.shape[1])
    return states[:, :frames].float(), taught[:, :frames].float()


def _draw(speech: Speech, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return windows of training clips, float32 ``(N, T)``, and labels ``(N,)``."""
    count, windows, labels = round(WINDOW_S * RATE_HZ), [], []
    for place in rng.integers(len(speech.split.train), size=BATCH):
        clip = speech.split.train[place]
        samples = read_samples(clip, RATE_HZ)
        start = rng.integers(max(1, len(samples) - count + 1))
        windows.append(np.resize(samples[start : start + count], count))
        labels.append(speech.labels.index(clip.emotion))
    return torch.from_numpy(np.stack(windows)), torch.tensor(labels)


@torch.no_grad()
def _scores(
    matching: Matching,
    teacher: Teacher,
    asked: Sequence[tuple[Clip, Samples]],
    labels: Sequence[str],
) -> dict[str, Any]:
    cosines, answers = [], []
    for _, samples in asked:
        window = torch.from_numpy(samples)[None]
        logits, states = matching(window)
        answers.append(int(logits.argmax()))
        pairs = [_paired(a, b) for a, b in zip(states, teacher(window), strict=True)]
        cosines.append([functional.cosine_similarity(*p, dim=2).mean().item() for p in pairs])
    true = np.array([labels.index(clip.emotion) for clip, _ in asked])
    ua = metrics.ua(metrics.confusion(true, np.array(answers), len(labels)))
    return {"cosine": np.mean(cosines, axis=0).tolist(), "ua": float(ua)}


def _write_speech(speech: Speech, folder: Path) -> None:
    chosen = spread_over(speech.split.calibration, CALIBRATION)
    sides = {
        "calibration": [(clip, read_samples(clip, RATE_HZ)) for clip in chosen],
        "clips": spread_over(of_length(speech.split.validation, COMPARED_S, RATE_HZ), COMPARED),
    }
    for name, heard in sides.items():
        (folder / name).mkdir(exist_ok=True)
        rows = ["path"]
        for number, (_, samples) in enumerate(heard):
            rows.append(f"{number:04}.wav")
            soundfile.write(folder / name / rows[-1], samples, RATE_HZ, subtype="FLOAT")
        (folder / name / "manifest.csv").write_text("\n".join(rows) + "\n")
