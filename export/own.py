"""``python -m export quantize MODEL``: a user's own network to a certified INT8 bundle."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edge_ser.bundle import SCHEMA_VERSION, Metadata
from export.adopt import adopt
from export.augment import Augmentation
from export.certify import agree, certify, predict, write_certificate
from export.checkpoint import locate
from export.conditions import spread_over
from export.confidence import abstain_threshold, clip_probs, fit_temperature
from export.corpora import Clip, label_mask, read_manifest
from export.costs import costs, table
from export.errors import CertificateError, CorpusError, RecipeError
from export.finetuned import load_finetuned
from export.graph import check_parity, export_graph
from export.pack import make_bundle, tool_versions
from export.quantize import make_int8
from export.recipe import Quantize, Windows
from export.speech import RATE_HZ
from export.stage import fingerprint, run_stage
from export.views import Cutting, Samples, view_windows

FEWEST = 16
CALIBRATION = 128
JUDGED = 200
"""Clips: the fewest that are accepted, and the most that are calibrated and judged with."""


@dataclass(frozen=True)
class Own:
    """What a user asks for.

    Attributes:
        model: A folder or hub id of transformers, or an ONNX file.
        calibration: Manifest of clips to calibrate with: ``path``, and ``emotion`` if known.
        evaluation: Manifest of clips to score: ``path, emotion``, and ``speaker`` if known.
        out: Takes a folder of the bundle's name.
        name: Of the bundle; of the model without one.
        windows: How the runtime is to cut clips.
        labels: In the order of the logits; needed for an ONNX file.
        padded: See `export.finetuned.load_finetuned`.
        settings: How INT8 is made.
        uncertified: Whether a model that misses the gate is packed all the same, and says so.
        json: Takes what `export.costs.costs` returns.
    """

    model: str
    calibration: Path
    evaluation: Path | None
    out: Path
    name: str = ""
    windows: Windows = field(default_factory=lambda: Windows(4.0, 1.0))
    labels: tuple[str, ...] = ()
    padded: bool = True
    settings: Quantize = field(default_factory=Quantize)
    uncertified: bool = False
    json: Path | None = None


def quantize_model(own: Own) -> Path:
    """Make and certify a bundle; stages that are done are not made again.

    Returns:
        The folder of the bundle.

    Raises:
        EdgeSerError: The model or the clips cannot be used, or the gate was missed.
    """
    name = own.name or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(own.model).stem).strip("-")
    home = own.out / name
    cutting = Cutting(RATE_HZ, own.windows, Augmentation())
    clips = read_manifest(own.calibration, ("path",))
    if len(clips) < FEWEST:
        raise CorpusError(f"{own.calibration}: {len(clips)} clips, allowed are {FEWEST} or more")
    # A quarter is not calibrated with: one half of it chooses, the other judges what was chosen.
    choosing, judged = spread_over(clips[3::8], JUDGED), spread_over(clips[7::8], JUDGED)
    calibration = spread_over([clip for n, clip in enumerate(clips) if n % 4 != 3], CALIBRATION)
    asked = read_manifest(own.evaluation, ("path", "emotion")) if own.evaluation else ()
    both = {clip.path.resolve() for clip in clips} & {clip.path.resolve() for clip in asked}
    if both:
        raise CorpusError(f"{own.evaluation}: {min(both).name!r} is calibrated with as well")
    folders = {
        stage: home / stage for stage in ("graph", "confidence", "quantize", "certify", "bundle")
    }
    file = Path(own.model)
    checkpoint = file if file.suffix == ".onnx" else locate(own.model)
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*"))
    reads: dict[str, Any] = {
        "model": fingerprint(one for one in files if one.is_file()),
        "labels": own.labels, "padded": own.padded, "windows": own.windows,
    }  # fmt: skip
    windows = partial(_first_windows, cutting=cutting)
    key = run_stage(folders["graph"], reads, partial(_graph, own, windows(calibration[:8])))
    labels = tuple(json.loads((folders["graph"] / "labels.json").read_text()))
    for clip in asked:
        if clip.emotion not in labels:
            raise CorpusError(
                f"{own.evaluation}: emotion {clip.emotion!r}, allowed are {', '.join(labels)}"
            )
    heard = fingerprint(clip.path for clip in (*calibration, *choosing, *judged, *asked))
    reads = {"after": key, "clips": heard, "emotions": [clip.emotion for clip in clips]}
    plain = _metadata(own, name, labels)
    make = partial(_confidence, plain, folders["graph"], choosing)
    key = run_stage(folders["confidence"], reads, make)
    known = json.loads((folders["confidence"] / "confidence.json").read_text())
    metadata = _metadata(own, name, labels, **known)

    def quantize(folder: Path) -> None:
        make_int8(folders["graph"], windows(calibration), windows(choosing), own.settings, folder)

    key = run_stage(folders["quantize"], {"after": key, "settings": own.settings}, quantize)
    emotions = [[clip.emotion, clip.speaker_key] for clip in asked]
    reads = {"after": key, "asked": emotions, "allowed": own.uncertified}
    make = partial(_certify, own, metadata, folders, calibration, judged, asked)
    key = run_stage(folders["certify"], reads, make)
    gate = json.loads((folders["certify"] / "certificate.json").read_text())["gate"]
    passed = all(one["passed"] for one in gate.values())
    metadata = _metadata(own, name, labels, **known, certified=passed)
    make = partial(make_bundle, metadata, folders["quantize"], folders["certify"], None)
    run_stage(folders["bundle"], {"after": key, "name": name}, make)
    found = costs(folders["bundle"])
    state = "certified" if found["certified"] else "NOT certified"
    print(f"{table(found)}\n\n{state}: edge-ser predict FILE --bundle {folders['bundle']}")
    if own.json:
        own.json.write_text(json.dumps(found, indent=1) + "\n")
    return folders["bundle"]


def _first_windows(clips: Sequence[Clip], cutting: Cutting) -> list[Samples]:
    return [next(view_windows(clip, 0, cutting)) for clip in clips]


def _graph(own: Own, windows: Sequence[Samples], folder: Path) -> None:
    """The stage: ``model.onnx``, ``labels.json`` and ``parity.json``."""
    properties: dict[str, Any] = {"sample_rate_hz": RATE_HZ, "schema_version": SCHEMA_VERSION}
    file, parity = folder / "model.onnx", {}
    if Path(own.model).suffix == ".onnx":
        if not own.labels:
            raise RecipeError("an ONNX file needs --labels, in the order of its logits")
        labels = own.labels
        adopt(Path(own.model), labels, {"labels": labels, **properties}, file)
    else:
        network, named = load_finetuned(own.model, own.windows.window_s, own.padded)
        labels = own.labels or named
        if len(labels) != len(named):
            raise RecipeError(f"{len(labels)} labels, but {own.model!r} has {len(named)} logits")
        export_graph(network, {"labels": labels, **properties}, RATE_HZ, file)
        parity = {"worst_logit_difference": check_parity(network, file, windows)}
        tqdm.write(f"graph: differs from torch by {parity['worst_logit_difference']:.1e} at most")
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "parity.json").write_text(json.dumps(parity))


def _metadata(
    own: Own,
    name: str,
    labels: tuple[str, ...],
    *,
    temperature: float = 1.0,
    abstain_below: float = 0.0,
    certified: bool = False,
) -> Metadata:
    return Metadata(
        name=name, labels=labels, sample_rate_hz=RATE_HZ, **asdict(own.windows),
        temperature=temperature, abstain_below=abstain_below, certified=certified,
        encoder={"source": Path(own.model).name}, head={}, teacher=None, corpora=(),
        tools=tool_versions(), files={},
    )  # fmt: skip


def _confidence(metadata: Metadata, graphs: Path, clips: Sequence[Clip], folder: Path) -> None:
    """The stage: temperature and threshold, as far as labels are known."""
    found = {"temperature": 1.0, "abstain_below": 0.0}
    clips = [clip for clip in clips if clip.emotion in metadata.labels]
    if clips:
        _, means = predict(metadata, graphs / "model.onnx", clips)
        logits = [mean[None] for mean in means]
        true = np.array([metadata.labels.index(clip.emotion) for clip in clips])
        found["temperature"] = fit_temperature(logits, true)
        probs = clip_probs(logits, found["temperature"])
        found["abstain_below"] = abstain_threshold(probs, true)
    (folder / "confidence.json").write_text(json.dumps(found))


def _certify(
    own: Own,
    metadata: Metadata,
    folders: dict[str, Path],
    calibration: Sequence[Clip],
    judged: Sequence[Clip],
    asked: Sequence[Clip],
    folder: Path,
) -> None:
    """The stage: the certificate; a missed gate is an error unless it is allowed."""
    facts = {
        "model": Path(own.model).name,
        "calibration": [clip.path.name for clip in calibration],
        "parity": json.loads((folders["graph"] / "parity.json").read_text()),
        "quantization": json.loads((folders["quantize"] / "quantization.json").read_text()),
    }
    clips = asked or judged
    with tqdm(total=3 * len(clips), unit="clip", desc="certify") as bar:
        if asked:
            masks = label_mask(asked, metadata.labels)
            scores = certify(metadata, folders["quantize"], asked, masks, None, bar)
        else:
            scores = agree(metadata, folders["quantize"], judged, bar)
    try:
        write_certificate(metadata, facts, scores, folder)
    except CertificateError as exc:
        if not own.uncertified:
            raise CertificateError(f"{exc}; --allow-uncertified packs it all the same") from exc
        tqdm.write(f"not certified: {exc}")
