"""What small changes of a recording do to the answers: the questions of audEERING's ser-tests.

After Wagner et al. (arXiv 2312.06270): changes that nobody would notice should leave the answer as
it is, and noise, a tilted spectrum or a telephone should cost little accuracy. Asked on validation
speakers, of a network that has not heard them.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal
import torch
from tqdm import tqdm

from edge_ser.windows import windows
from export import metrics
from export.confidence import clip_probs
from export.corpora import Clip, read_samples
from export.effects import add_noise, clip_peaks, telephone, tilt
from export.errors import RecipeError
from export.metrics import Ints
from export.model import load_classifier
from export.nonspeech import sound
from export.run import Run
from export.seeds import shown, spread
from export.speech import RATE_HZ
from export.splits import pooled
from export.views import Samples
from export.workers import workers

Change = Callable[[Samples, np.random.Generator], Samples]

SNR_DB = 20.0
TILT_DB = 3.0  # an octave
UNCHANGED = 0.95
LOST = {"noise": 0.05, "tilt": 0.02, "telephone": 0.05}
"""What ser-tests allows: the least share of equal answers, and the largest loss of UA."""


def tone(samples: Samples, rng: np.random.Generator) -> Samples:
    """Add a sine of 5 kHz, 40 to 50 dB below full scale."""
    time_s = np.arange(len(samples)) / RATE_HZ
    level = 10 ** (rng.choice([-40, -45, -50]) / 20)
    return samples + (level * np.sin(2 * np.pi * 5000 * time_s)).astype(np.float32)


def clipping(samples: Samples, rng: np.random.Generator) -> Samples:
    """Amplify until 0.1 to 0.3 % of the samples lie beyond full scale, and cut them."""
    return clip_peaks(samples, beyond=rng.choice([0.001, 0.002, 0.003]))


def silence(samples: Samples, rng: np.random.Generator, *, before: bool) -> Samples:
    """Add 100 to 1000 samples of silence before or behind."""
    zeros = np.zeros(rng.choice([100, 500, 1000]), np.float32)
    return np.concatenate([zeros, samples] if before else [samples, zeros])


def cut(samples: Samples, rng: np.random.Generator, *, before: bool) -> Samples:
    """Cut 100 to 1000 samples off the beginning or the end."""
    count = int(rng.choice([100, 500, 1000]))
    return samples[count:] if before else samples[:-count]


def level(samples: Samples, rng: np.random.Generator) -> Samples:
    """Change the level by 1 or 2 dB."""
    return samples * np.float32(10 ** (rng.choice([-2, -1, 1, 2]) / 20))


def high_pass(samples: Samples, rng: np.random.Generator) -> Samples:
    """Cut what is below 50 to 150 Hz, by a Butterworth filter of order 1."""
    return _filtered(samples, 1, rng.choice([50, 100, 150]), "highpass")


def low_pass(samples: Samples, rng: np.random.Generator) -> Samples:
    """Cut what is above 6.5 to 7.5 kHz, by a Butterworth filter of order 1."""
    return _filtered(samples, 1, rng.choice([6500, 7000, 7500]), "lowpass")


def faint_noise(samples: Samples, rng: np.random.Generator) -> Samples:
    """Add white noise, 35 to 45 dB below full scale."""
    level = np.float32(10 ** (rng.choice([-35, -40, -45]) / 20) / 3)  # a peak is three deviations
    return samples + level * rng.standard_normal(len(samples), np.float32)


def _filtered(samples: Samples, order: int, edge_hz: float, kind: str) -> Samples:
    sections = scipy.signal.butter(order, edge_hz, kind, fs=RATE_HZ, output="sos")
    return np.asarray(scipy.signal.sosfilt(sections, samples), np.float32)


def white_noise(samples: Samples, rng: np.random.Generator) -> Samples:
    """Add white noise, the speech 20 dB above it."""
    return add_noise(samples, RATE_HZ, rng, snr_db=SNR_DB)


def music(samples: Samples, rng: np.random.Generator) -> Samples:
    """Add tones like music, the speech 20 dB above them."""
    played = sound("music", int(rng.integers(1000)), len(samples) / RATE_HZ, RATE_HZ)
    return _mixed(samples, played[: len(samples)])


def babble(samples: Samples, rng: np.random.Generator, *, others: Sequence[Samples]) -> Samples:
    """Add five other clips at once, the speech 20 dB above them."""
    chosen = [others[place] for place in rng.choice(len(others), 5, replace=False)]
    return _mixed(samples, np.sum([np.resize(other, len(samples)) for other in chosen], axis=0))


def _mixed(samples: Samples, other: Samples) -> Samples:
    ratio = np.sqrt(np.square(samples).mean() / max(float(np.square(other).mean()), 1e-20))
    return samples + np.float32(ratio * 10 ** (-SNR_DB / 20)) * other.astype(np.float32)


SMALL: dict[str, Change] = {
    "tone": tone,
    "silence behind": partial(silence, before=False),
    "silence before": partial(silence, before=True),
    "clipping": clipping,
    "beginning cut": partial(cut, before=True),
    "end cut": partial(cut, before=False),
    "level": level,
    "high-pass": high_pass,
    "low-pass": low_pass,
    "faint noise": faint_noise,
}
LARGE: dict[str, tuple[str, Change]] = {
    "white noise": ("noise", white_noise),
    "music": ("noise", music),
    "babble": ("noise", babble),
    "tilt up": ("tilt", lambda samples, _: tilt(samples, RATE_HZ, db=TILT_DB)),
    "tilt down": ("tilt", lambda samples, _: tilt(samples, RATE_HZ, db=-TILT_DB)),
    "telephone": ("telephone", lambda samples, _: telephone(samples, RATE_HZ)),
}


def run_robustness(
    path: Path, corpora: Path, weights: Path | None, out: Path, seeds: Sequence[int]
) -> None:
    """Ask a recipe that has been run: ``<out>/<name>/robustness.json`` and ``.md``.

    Raises:
        RecipeError: The recipe has [folds], or has not been run.
    """
    found = [measure(Run(path, corpora, weights, out, seed=seed)) for seed in seeds]
    run = Run(path, corpora, weights, out)
    summary = {
        "recipe": run.recipe.name,
        "command": f"python -m export robustness {path.name} --seeds {','.join(map(str, seeds))}",
        "seeds": list(seeds),
        "clips": len(pooled(run.speech.split.validation)),
        "pooled_ua": spread([one["pooled_ua"] for one in found]),
        "unchanged": {n: spread([one["unchanged"][n] for one in found]) for n in (*SMALL, *LARGE)},
        "ua_change": {n: spread([one["ua_change"][n] for one in found]) for n in (*SMALL, *LARGE)},
    }
    (run.home / "robustness.json").write_text(json.dumps(summary, indent=1) + "\n")
    (run.home / "robustness.md").write_text(table(summary))
    print(table(summary))


def measure(run: Run) -> dict[str, Any]:
    """Return what every change does to the network of a run that has not heard validation.

    Returns:
        ``pooled_ua`` of the clips as they are; for every change ``unchanged``, the share of equal
        answers, and ``ua_change``, how much higher pooled UA is with it.
    """
    if run.recipe.folds:
        raise RecipeError(f"{run.path}: a recipe with [folds] has no validation speakers")
    part = "fold0" if run.recipe.train else "choice"
    trained = run.folder / "train" / part / "model.safetensors"
    if not trained.is_file():
        raise RecipeError(f"nothing at {str(trained)!r}; run {run.path} with the same --out first")
    clips = pooled(run.speech.split.validation)
    true = np.array([run.speech.labels.index(clip.emotion) for clip in clips])
    names = ["", *SMALL, *LARGE]
    with workers() as pool:
        each = pool.map(
            answers, *zip(*((run, trained, clips, name) for name in names), strict=True)
        )
        of_name = dict(zip(names, tqdm(each, total=len(names), unit="change"), strict=True))
    as_it_is, classes = of_name.pop(""), len(run.speech.labels)

    def ua(predicted: Ints) -> float:
        return float(metrics.ua(metrics.confusion(true, predicted, classes)))

    return {
        "pooled_ua": ua(as_it_is),
        "unchanged": {n: float((found == as_it_is).mean()) for n, found in of_name.items()},
        "ua_change": {n: ua(found) - ua(as_it_is) for n, found in of_name.items()},
    }


@torch.no_grad()
def answers(run: Run, trained: Path, clips: Sequence[Clip], change: str) -> Ints:
    """Return the class of every clip after a change; as it is without one.

    Args:
        run: Of the network.
        trained: Its weights.
        clips: N clips.
        change: A name of `SMALL` or `LARGE`, or none.

    Returns:
        int64 (N,).
    """
    network = load_classifier(run.recipe, run.weights, trained)
    settings = run.recipe.windows
    window, hop = (round(seconds * RATE_HZ) for seconds in (settings.window_s, settings.hop_s))
    heard = [read_samples(clip, RATE_HZ) for clip in clips]
    logits = []
    for number, samples in enumerate(heard):
        changed = samples
        if change:
            others = [heard[(number + step) % len(heard)] for step in range(1, 40)]
            apply = SMALL[change] if change in SMALL else LARGE[change][1]
            if change == "babble":
                apply = partial(apply, others=others)
            changed = apply(samples, np.random.default_rng(number))
        parts = [torch.from_numpy(part)[None] for _, part in windows([changed], window, hop)]
        logits.append(np.concatenate([network(part)[0].numpy() for part in parts]))
    return np.asarray(clip_probs(logits).argmax(axis=1), np.int64)


def table(summary: dict[str, Any]) -> str:
    """Return the changes as a Markdown table."""
    lines = [
        f"`{summary['command']}`: {summary['clips']} clips of validation speakers, answered by "
        "networks that have not heard them; pooled unweighted accuracy as they are "
        f"{shown(summary['pooled_ua'])}. Allowed after Wagner et al. (arXiv 2312.06270).",
        "",
        "| change | equal answers | UA | allowed |",
        "|---|---|---|---|",
    ]
    for name in (*SMALL, *LARGE):
        same, ua = summary["unchanged"][name], summary["ua_change"][name]
        if name in SMALL:
            allowed = f"{UNCHANGED:.2f} equal" + ("" if same["mean"] >= UNCHANGED else ": missed")
        else:
            lost = LOST[LARGE[name][0]]
            allowed = f"{-lost:+.2f} UA" + ("" if ua["mean"] >= -lost else ": missed")
        lines.append(f"| {name} | {shown(same)} | {shown(ua, '+.3f')} | {allowed} |")
    return "\n".join(lines) + "\n"
