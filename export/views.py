"""Views of a clip: what is heard of it, as recorded or augmented, computed once and cached.

View 0 is the clip as the runtime cuts it into windows; each further view is an augmented copy, cut
to one window. A view depends on the clip and its number only, never on what ran before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edge_ser.windows import windows
from export.augment import Augmentation, augment
from export.corpora import Clip, read_samples
from export.nonspeech import KINDS, sound
from export.recipe import Windows
from export.workers import workers

SHARD = 16  # clips a file: a killed run loses no more than the files that were being written

Samples = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[np.generic]]
Compute = Callable[[Samples], Arrays]


@dataclass(frozen=True)
class Cutting:
    """How views are cut from a clip: the rate, the runtime's windows, and the augmentation."""

    rate_hz: int
    windows: Windows
    augmentation: Augmentation


@dataclass(frozen=True)
class View:
    """One window of one view: the clip's place in the list of clips, and what was computed."""

    clip: int
    number: int
    arrays: Arrays


def view_windows(clip: Clip, number: int, cutting: Cutting) -> Iterator[Samples]:
    """Yield the windows of a view: all of the runtime's for view 0, a single one for the others."""
    samples = read_samples(clip, cutting.rate_hz)
    window = round(cutting.windows.window_s * cutting.rate_hz)
    if number == 0:
        hop = round(cutting.windows.hop_s * cutting.rate_hz)
        yield from (part for _, part in windows([samples], window, hop))
        return
    name = f"{clip.corpus}/{clip.path.name}".encode()
    rng = np.random.default_rng([number, *name])
    samples = augment(samples, cutting.rate_hz, rng, cutting.augmentation)
    start = int(rng.integers(max(0, len(samples) - window), endpoint=True))
    yield samples[start : start + window]


def make_views(
    folder: Path,
    clips: Sequence[Clip],
    views: Sequence[int],
    cutting: Cutting,
    load: Callable[[], Compute],
) -> None:
    """Compute something of the views of every clip, on all cores, and keep it.

    Files that are already in ``folder`` are not made again.

    Args:
        folder: Takes one ``.npz`` file for every few clips.
        clips: The clips, in the order that `View.clip` counts.
        views: How many augmented views each clip has beside the one as recorded.
        cutting: How they are cut.
        load: Makes the computation, once in each worker process; it must be picklable.
    """
    starts = [s for s in range(0, len(clips), SHARD) if not _shard(folder, s).exists()]
    with (
        workers(begin=partial(_keep, load)) as pool,
        tqdm(total=len(clips), initial=len(clips) - _count(starts, len(clips))) as bar,
    ):
        jobs = [
            (s, clips[s : s + SHARD], views[s : s + SHARD], cutting, _shard(folder, s))
            for s in starts
        ]
        for done in pool.map(_make_shard, jobs):
            bar.update(done)


def make_sound_views(
    folder: Path, first: int, count: int, cutting: Cutting, compute: Compute
) -> None:
    """Compute the same of sounds that are no speech: one view of each, number 0.

    Args:
        folder: Takes one ``.npz`` file.
        first: What `View.clip` counts the first sound as: the number of clips.
        count: How many sounds.
        cutting: Rate and longest window.
        compute: What `make_views` loads.
    """
    arrays: Arrays = {}
    for number in range(count):
        seconds = np.random.default_rng(number).uniform(0.5, cutting.windows.window_s)
        samples = sound(KINDS[number % len(KINDS)], number, seconds, cutting.rate_hz)
        for name, array in compute(samples).items():
            arrays[f"{first + number}_0_0/{name}"] = array
    np.savez(folder / "views_nonspeech.npz", **arrays)


def load_views(folder: Path) -> list[View]:
    """Return all views of a folder, by clip and number."""
    found = []
    for file in sorted(folder.glob("views_*.npz")):
        with np.load(file, allow_pickle=False) as shard:
            arrays: dict[str, Arrays] = {}
            for key in shard.files:
                row, name = key.split("/")
                arrays.setdefault(row, {})[name] = shard[key]
        for row, named in arrays.items():
            clip, number, _ = (int(part) for part in row.split("_"))
            found.append(View(clip, number, named))
    return found


def _shard(folder: Path, start: int) -> Path:
    return folder / f"views_{start:06d}.npz"


def _count(starts: Sequence[int], clips: int) -> int:
    return sum(min(SHARD, clips - start) for start in starts)


_load: Callable[[], Compute]  # of this worker process


def _keep(load: Callable[[], Compute]) -> None:
    global _load
    _load = load


@cache
def _compute() -> Compute:
    # By the first job rather than at the start, where an error would have no way out.
    return _load()


def _make_shard(
    job: tuple[int, Sequence[Clip], Sequence[int], Cutting, Path],
) -> int:
    start, clips, views, cutting, file = job
    compute = _compute()
    arrays: Arrays = {}
    for index, (clip, most) in enumerate(zip(clips, views, strict=True), start):
        for number in range(most + 1):
            for part, samples in enumerate(view_windows(clip, number, cutting)):
                for name, array in compute(samples).items():
                    arrays[f"{index}_{number}_{part}/{name}"] = array
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    partial.rename(file)
    return len(clips)
