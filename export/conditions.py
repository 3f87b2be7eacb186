"""Length, level and noise: rows of a certificate that say where INT8 leaves full precision."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edge_ser.bundle import Metadata
from edge_ser.recognizer import Recognizer, probabilities
from export import metrics
from export.corpora import Clip, read_samples
from export.effects import add_noise
from export.probe import engine_of

MOST = 200  # clips a row; all that are offered would take longer than everything before
LENGTHS_S = (1, 3, 7)
SOFT_DB = -30.0
PEAK = 0.99
NOISE_DB = (20, 10)

Samples = npt.NDArray[np.float32]
Change = Callable[[Samples, int], Samples]
T = TypeVar("T")


def of_length(clips: Sequence[Clip], length_s: float, rate_hz: int) -> list[tuple[Clip, Samples]]:
    """Cut clips to a length; those that are too short go on with others of the same voice.

    Args:
        clips: Any.
        length_s: In seconds.
        rate_hz: Of the samples.

    Returns:
        Each clip's beginning, followed where it is too short by the clips of the same corpus,
        speaker and emotion that come next. Left out are those of whom there is too little.
    """
    count = round(length_s * rate_hz)
    voices: dict[tuple[str, str, str], list[Clip]] = {}
    for clip in clips:
        voices.setdefault((clip.corpus, clip.speaker_key, clip.emotion), []).append(clip)
    found = []
    for clip in clips:
        alike = voices[clip.corpus, clip.speaker_key, clip.emotion]
        place = alike.index(clip)
        joined = np.empty(0, np.float32)
        for other in (*alike[place:], *alike[:place]):
            joined = np.concatenate([joined, read_samples(other, rate_hz)])
            if len(joined) >= count:
                found.append((clip, joined[:count]))
                break
    return found


def spread_over(clips: Sequence[T], most: int) -> list[T]:
    """Return so many clips at most, evenly from the first to the last."""
    places = np.linspace(0, len(clips) - 1, min(most, len(clips))).astype(int)
    return [clips[place] for place in places]


def changes(rate_hz: int) -> dict[str, Change]:
    """Return what is done to whole clips, by the name of the row."""

    def soft(samples: Samples, _: int) -> Samples:
        return samples * np.float32(10 ** (SOFT_DB / 20))

    def loud(samples: Samples, _: int) -> Samples:
        return samples * np.float32(PEAK / max(float(np.abs(samples).max()), 1e-6))

    def noisy(snr_db: float) -> Change:
        return lambda samples, seed: add_noise(
            samples, rate_hz, np.random.default_rng(seed), snr_db=snr_db
        )

    noises = {f"noise, {snr_db} dB": noisy(snr_db) for snr_db in NOISE_DB}
    return {"as it is": lambda samples, _: samples, f"{SOFT_DB:g} dB": soft,
            f"peak {PEAK}": loud, **noises}  # fmt: skip


def rows(
    metadata: Metadata, fp32: Path, int8: Path, clips: Sequence[Clip], labelled: bool = True
) -> list[dict[str, Any]]:
    """Compare two graphs, as the runtime runs them, on every condition.

    Args:
        metadata: Labels, windows and temperature.
        fp32: The full-precision graph.
        int8: The other one.
        clips: At most `MOST` of them are heard, spread over all.
        labelled: Whether their emotions are labels.

    Returns:
        For each ``condition`` how many ``clips``, the share of ``labels_equal``, the mean
        ``kl`` divergence of the answers from full precision in nats, and ``ua`` of both by graph.
    """
    rate_hz = metadata.sample_rate_hz
    recognizers = [Recognizer(metadata, engine_of(file)) for file in (fp32, int8)]
    found = []
    for name, heard in under_conditions(spread_over(clips, MOST), rate_hz):
        logits = [
            [one.run(samples, rate_hz)[1].mean(axis=0) for one in recognizers]
            for _, samples in tqdm(heard, desc=name, unit="clip")
        ]
        if heard:
            found.append(
                {"condition": name, **_row(metadata, [c for c, _ in heard], logits, labelled)}
            )
    return found


def under_conditions(
    clips: Sequence[Clip], rate_hz: int
) -> Iterator[tuple[str, list[tuple[Clip, Samples]]]]:
    """Yield every condition by its name, and the clips as they sound under it.

    Args:
        clips: Any; those of whose voice there is too little have no row of the longer lengths.
        rate_hz: Of the samples.
    """
    for length_s in LENGTHS_S:
        yield f"{length_s} s", of_length(clips, length_s, rate_hz)
    whole = [(clip, read_samples(clip, rate_hz)) for clip in clips]
    for name, change in changes(rate_hz).items():
        yield name, [(clip, change(samples, n)) for n, (clip, samples) in enumerate(whole)]


def _row(
    metadata: Metadata, clips: Sequence[Clip], logits: Sequence[Any], labelled: bool
) -> dict[str, Any]:
    exact, rounded = probabilities(np.array(logits, np.float64), metadata.temperature).swapaxes(
        0, 1
    )
    answers = exact.argmax(axis=1), rounded.argmax(axis=1)
    row: dict[str, Any] = {
        "clips": len(clips),
        "labels_equal": float((answers[0] == answers[1]).mean()),
        "kl": metrics.divergence(exact, rounded),
    }
    if labelled:
        true = np.array([metadata.labels.index(clip.emotion) for clip in clips])
        classes = len(metadata.labels)
        row["ua"] = {
            graph: float(metrics.ua(metrics.confusion(true, answer, classes)))
            for graph, answer in zip(("fp32", "int8"), answers, strict=True)
        }
    return row


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return `rows` as a Markdown table."""
    lines = [
        "| condition | clips | equal answers | divergence, nats | UA, fp32 | UA, INT8 |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        graphs = ("fp32", "int8")
        ua = [f"{row['ua'][graph]:.3f}" if "ua" in row else "" for graph in graphs]
        cells = (row["condition"], row["clips"], f"{row['labels_equal']:.1%}", f"{row['kl']:.1e}")
        lines.append(f"| {' | '.join(map(str, (*cells, *ua)))} |")
    return "\n".join(lines) + "\n"
