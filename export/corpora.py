"""Emotional-speech corpora: a folder with one `manifest.csv` -> clips -> labelled clips -> samples.

A manifest has at least the columns `path, emotion, speaker, gender, language, duration_s`. What a
corpus calls its emotions stays as it is until `select` maps it to the labels of a model.
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_ser import audio
from export.errors import CorpusError

COLUMNS = ("path", "emotion", "speaker", "gender", "language", "duration_s")


@dataclass(frozen=True)
class Facts:
    """What is known of a public corpus besides its manifest.

    Attributes:
        licence: As its source states it.
        source: Where it was published.
        family: Corpora of one family share their speakers, so a split must see them as one.
        levels: Values of the emotion column when they are degrees of expression and not emotions.
            Such a clip fits a model only if its labels hold all of them.
    """

    licence: str
    source: str
    family: str
    levels: tuple[str, ...] = ()


_EMODB = "Burkhardt et al., A Database of German Emotional Speech, Interspeech 2005"

KNOWN: Mapping[str, Facts] = {
    "emodb": Facts("not stated", _EMODB, "emodb"),
    "emodb_2s": Facts("not stated", f"{_EMODB} (first two seconds)", "emodb"),
    "ravdess": Facts(
        "CC BY-NC-SA 4.0",
        "Livingstone and Russo, RAVDESS, PLoS ONE 13(5): e0196391, 2018",
        "ravdess",
    ),
    "urdu": Facts(
        "research purposes only",
        "Latif et al., Cross Lingual Speech Emotion Recognition, FIT 2018, arXiv:1812.10411",
        "urdu",
    ),
    "baved": Facts(
        "not stated",
        "Basic Arabic Vocal Emotions Dataset, GitHub 40uf411/Basic-Arabic-Vocal-Emotions-Dataset",
        "baved",
        levels=("low", "neutral", "high"),
    ),
    "nemo": Facts(
        "CC BY-NC-SA 4.0",
        "Christop, nEMO: Dataset of Emotional Speech in Polish, LREC-COLING 2024",
        "nemo",
    ),
    "turev": Facts(
        "CC BY-NC-ND 4.0",
        "Canpolat et al., Turkish Emotion Voice Database, SLTU-CCURL 2020",
        "turev",
    ),
}


@dataclass(frozen=True)
class Clip:
    """One recording of one speaker.

    Attributes:
        corpus: Name of the corpus, which is its folder's name.
        family: Name of the corpora that share these speakers.
        path: The audio file.
        emotion: What the corpus calls it; a label of the model after `select`.
        speaker: Unique within the family only.
        gender: "f", "m", or "" where the corpus does not say.
        language: ISO 639-1 code.
        duration_s: Length in seconds as the manifest states it.
    """

    corpus: str
    family: str
    path: Path
    emotion: str
    speaker: str
    gender: str
    language: str
    duration_s: float

    @property
    def speaker_key(self) -> str:
        """The speaker across all corpora, "family/speaker"."""
        return f"{self.family}/{self.speaker}"


@dataclass(frozen=True)
class Selection:
    """Clips that carry a label of the model, and what was left out.

    Attributes:
        clips: Every clip's `emotion` is one of the labels.
        dropped: Clips left out, by (corpus, emotion).
    """

    clips: tuple[Clip, ...]
    dropped: Mapping[tuple[str, str], int]


def family(corpus: str) -> str:
    """Return the name under which the speakers of `corpus` are unique."""
    return KNOWN[corpus].family if corpus in KNOWN else corpus


def read_corpus(folder: Path) -> tuple[Clip, ...]:
    """Read the manifest of one corpus, in its order: `read_manifest` of its `manifest.csv`."""
    return read_manifest(Path(folder) / "manifest.csv")


def read_manifest(manifest: Path, needed: Sequence[str] = COLUMNS) -> tuple[Clip, ...]:
    """Read a manifest, in its order.

    Args:
        manifest: A CSV file; its folder's name is the corpus' name, and paths start there.
        needed: The columns that must be there. Without `speaker` every clip counts as a speaker;
            what else is not there is blank, and a duration 0.

    Returns:
        At least one clip. Every file exists and lies below the folder.

    Raises:
        CorpusError: No manifest, no rows, a missing column, or a row that is not usable.
    """
    folder = manifest.parent
    try:
        with manifest.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise CorpusError(f"{manifest}: no column {missing[0]!r}, needed are {needed}")
            clips = tuple(_clip(row, manifest, reader.line_num, needed) for row in reader)
    except OSError as exc:
        raise CorpusError(f"{manifest}: cannot be read ({exc.strerror})") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise CorpusError(f"{manifest}: not a UTF-8 CSV file ({exc})") from exc
    if not clips:
        raise CorpusError(f"{manifest}: holds no clips")
    path, count = Counter(clip.path for clip in clips).most_common(1)[0]
    if count > 1:
        raise CorpusError(f"{manifest}: {str(path.relative_to(folder))!r} stands in {count} rows")
    return clips


def _clip(row: dict[str, str], manifest: Path, line: int, needed: Sequence[str]) -> Clip:
    folder, where = manifest.parent, f"{manifest}, line {line}"
    if None in row or None in row.values():
        raise CorpusError(f"{where}: more or fewer fields than the header has")
    blank = [name for name in needed if name != "gender" and not row[name].strip()]
    if blank:
        raise CorpusError(f"{where}: {blank[0]!r} is blank")
    absent = {"emotion": "", "speaker": f"of line {line}", "gender": "", "language": ""}
    row = {**absent, "duration_s": "0", **{name: value for name, value in row.items() if value}}
    if row["gender"] not in ("f", "m", ""):
        raise CorpusError(f"{where}: gender {row['gender']!r}, allowed are 'f', 'm' and blank")
    try:
        duration_s = float(row["duration_s"])
    except ValueError:
        duration_s = math.nan
    if not 0 <= duration_s < math.inf or (duration_s == 0 and "duration_s" in needed):
        raise CorpusError(f"{where}: duration_s {row['duration_s']!r} is not a positive number")
    relative = os.path.normpath(row["path"])
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise CorpusError(f"{where}: path {row['path']!r} leaves the corpus' folder")
    path = folder / relative
    if not path.is_file():
        raise CorpusError(f"{where}: {row['path']!r} is not a file of the corpus")
    return Clip(
        corpus=folder.name,
        family=family(folder.name),
        path=path,
        emotion=row["emotion"],
        speaker=row["speaker"],
        gender=row["gender"],
        language=row["language"],
        duration_s=duration_s,
    )


def load_corpora(root: Path, names: Sequence[str]) -> tuple[Clip, ...]:
    """Read several corpora that lie beside each other.

    Args:
        root: The folder of the corpora.
        names: Their folders, each once.

    Returns:
        The clips of all, corpus after corpus, with the emotions that the corpora name.

    Raises:
        CorpusError: An unknown or repeated name, or a fault that `read_corpus` finds.
    """
    root = Path(root)
    there = sorted(manifest.parent.name for manifest in root.glob("*/manifest.csv"))
    for name in names:
        if name not in there:
            raise CorpusError(f"no corpus {name!r} in {root}, there are {there}")
    if len(set(names)) < len(names) or not names:
        raise CorpusError(f"corpora {list(names)}, allowed are one or more of {there}, each once")
    return tuple(clip for name in names for clip in read_corpus(root / name))


def select(
    clips: Sequence[Clip], labels: Sequence[str], merge: Mapping[str, str] | None = None
) -> Selection:
    """Keep the clips that a model with these labels can use.

    Args:
        clips: As `load_corpora` reads them.
        labels: The labels of the model.
        merge: Emotions that count as a label, {"calm": "neutral"} for one.

    Returns:
        The clips, merged, and the number of those dropped for each corpus and emotion.

    Raises:
        CorpusError: A label that no clip has, or a merge that is from a label or to none.
    """
    merge = merge or {}
    for emotion, label in merge.items():
        if emotion in labels or label not in labels:
            raise CorpusError(
                f"merge {emotion!r} = {label!r}, allowed is from an emotion that is no label "
                f"to one of {list(labels)}"
            )
    kept, dropped = [], Counter[tuple[str, str]]()
    for clip in clips:
        label = merge.get(clip.emotion, clip.emotion)
        levels = KNOWN[clip.corpus].levels if clip.corpus in KNOWN else ()
        if label in labels and set(levels) <= set(labels):
            kept.append(replace(clip, emotion=label))
        else:
            dropped[clip.corpus, clip.emotion] += 1
    absent = [label for label in labels if all(clip.emotion != label for clip in kept)]
    if absent:
        corpora = sorted({clip.corpus for clip in clips})
        raise CorpusError(f"no clip has the label {absent[0]!r} in the corpora {corpora}")
    return Selection(tuple(kept), dict(dropped))


def label_mask(clips: Sequence[Clip], labels: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for every corpus which labels its clips have: bool of shape (len(labels),)."""
    found = {(clip.corpus, clip.emotion) for clip in clips}
    corpora = dict.fromkeys(clip.corpus for clip in clips)
    return {name: np.array([(name, label) in found for label in labels]) for name in corpora}


def describe(clips: Sequence[Clip]) -> list[dict[str, str]]:
    """Return name, language, licence and source of each corpus, as in a bundle's metadata."""
    languages = {clip.corpus: clip.language for clip in clips}
    unknown = Facts(licence="not known", source="not known", family="")
    return [
        {
            "name": name,
            "language": language,
            "licence": KNOWN.get(name, unknown).licence,
            "source": KNOWN.get(name, unknown).source,
        }
        for name, language in languages.items()
    ]


def read_samples(clip: Clip, rate_hz: int) -> npt.NDArray[np.float32]:
    """Read a clip as the runtime reads a file: mono float32 at `rate_hz`, shape (T,).

    Raises:
        AudioError: The file is not one that the runtime takes.
    """
    return audio.read(clip.path, rate_hz=rate_hz)
