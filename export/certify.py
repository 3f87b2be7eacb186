"""The certificate: full precision and INT8 on the test speakers, scored once, and the gate."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from edge_ser.adaptation import Adaptation
from edge_ser.bundle import Metadata, sha256
from edge_ser.recognizer import Recognizer
from export import conditions, metrics
from export.adapt import measure
from export.corpora import Clip
from export.errors import CertificateError
from export.nonspeech import KINDS, sound
from export.picture import draw
from export.probe import engine_of
from export.scores import brief, score
from export.speech import Speech
from export.splits import pooled, speakers

UA_KEPT = 0.99  # of the pooled UA of full precision, as MLPerf Inference asks of quantized models
LABELS_EQUAL = 0.98  # of the clips

NONSPEECH_MINUTES = 10

SYSTEMS = {"fp32": "model.onnx", "int8": "model_int8.onnx", "int8_x86": "model_int8_x86.onnx"}


def predict(
    metadata: Metadata, graph: Path, clips: Sequence[Clip], done: Any = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Answer clips as the runtime does with one graph.

    Args:
        metadata: Labels, windows and temperature.
        graph: The ONNX file.
        clips: N clips.
        done: A progress bar.

    Returns:
        The probs (N, C), and the calibrated logits (N, C), means over the windows.
    """
    recognizer = Recognizer(metadata, engine_of(graph))
    rows, means = [], []
    for clip in clips:
        spans, logits = recognizer.run(clip.path)
        rows.append(list(recognizer.answer(spans, logits).probs.values()))
        means.append(logits.mean(axis=0) / metadata.temperature)
        if done is not None:
            done.update()
    return np.array(rows), np.array(means, np.float64)


def compare(
    fp32: npt.NDArray[np.float64],
    int8: npt.NDArray[np.float64],
    clips: Sequence[Clip],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Say what INT8 costs: both are probs (N, C) of the same clips.

    Returns:
        ``ua_kept`` (pooled UA of INT8 over that of fp32), ``labels_equal`` (share of all clips),
        the paired difference of the pooled UA with its interval, McNemar's test, the recall lost
        by label, and whether the gate is ``passed``.
    """
    kept = set(pooled(clips))
    inside = np.array([clip in kept for clip in clips])
    true = np.array([labels.index(clip.emotion) for clip in clips])[inside]
    before, after = fp32.argmax(axis=1)[inside], int8.argmax(axis=1)[inside]
    speakers = [clip.speaker_key for clip in clips if clip in kept]
    corpora = [clip.corpus for clip in clips if clip in kept]
    matrices = [metrics.confusion(true, answer, len(labels)) for answer in (before, after)]
    lost = metrics.recalls(matrices[0]) - metrics.recalls(matrices[1])
    ua_kept = float(metrics.ua(matrices[1]) / metrics.ua(matrices[0]))
    equal = float((fp32.argmax(axis=1) == int8.argmax(axis=1)).mean())
    return {
        "ua_kept": ua_kept,
        "labels_equal": equal,
        "ua_difference": asdict(
            metrics.ua_difference(true, after, before, len(labels), speakers, corpora)
        ),
        "mcnemar": asdict(metrics.mcnemar(true, after, before)),
        "recall_lost": {
            label: float(value)
            for label, value in zip(labels, lost, strict=True)
            if not np.isnan(value)
        },
        "passed": ua_kept >= UA_KEPT and equal >= LABELS_EQUAL,
    }


def certify(
    metadata: Metadata,
    graphs: Path,
    clips: Sequence[Clip],
    masks: Mapping[str, npt.NDArray[np.bool_]],
    adaptation: Adaptation | None,
    done: Any = None,
) -> dict[str, Any]:
    """Score every graph of a folder on the test clips and compare the INT8 ones with fp32.

    Args:
        metadata: Labels, windows and temperature.
        graphs: Folder of the files in `SYSTEMS`.
        clips: The test clips.
        masks: For every corpus the labels that it has.
        adaptation: Of the bundle, if it has one.
        done: A progress bar, updated once a clip and graph.

    Returns:
        ``systems`` by name, each with its graph's SHA-256 and scores, ``gate`` by INT8 graph, and
        behind the INT8 graph for x86 ``adapted``, what the adaptation is worth, ``nonspeech``, what
        `doubts` says, and ``conditions``, what `export.conditions.rows` says of the pooled clips.
    """
    labels = metadata.labels
    answers = {
        name: predict(metadata, graphs / file, clips, done) for name, file in SYSTEMS.items()
    }
    probs = {name: of_graph for name, (of_graph, _) in answers.items()}
    kept = set(pooled(clips))
    where = np.array([place for place, clip in enumerate(clips) if clip in kept])
    heard = [clips[place] for place in where]
    true = np.array([labels.index(clip.emotion) for clip in heard])
    mask = np.stack([masks[clip.corpus] for clip in heard])
    logits = answers["int8_x86"][1][where]
    found = {
        "labels": list(labels),
        "systems": {
            name: {**identity, **score(probs[name], clips, labels, masks)}
            for name, identity in identities(graphs).items()
        },
        "gate": {
            name: compare(probs["fp32"], probs[name], clips, labels)
            for name in ("int8", "int8_x86")
        },
        "nonspeech": doubts(metadata, graphs / SYSTEMS["int8_x86"]),
        "conditions": conditions.rows(
            metadata, graphs / SYSTEMS["fp32"], graphs / SYSTEMS["int8_x86"], heard
        ),
    }
    if adaptation:
        many = [adaptation] * len(heard)
        found["adapted"] = measure(logits, many, heard, true, mask, len(labels))
    return found


def agree(
    metadata: Metadata, graphs: Path, clips: Sequence[Clip], done: Any = None
) -> dict[str, Any]:
    """Compare the INT8 graphs of a folder with fp32 on clips that nobody has labelled.

    Args:
        metadata: Labels, windows and temperature.
        graphs: Folder of the files in `SYSTEMS`.
        clips: Any.
        done: A progress bar, updated once a clip and graph.

    Returns:
        As `certify`, without anything that needs labels.
    """
    answers = {
        name: predict(metadata, graphs / file, clips, done)[0].argmax(axis=1)
        for name, file in SYSTEMS.items()
    }
    gate = {}
    for name in ("int8", "int8_x86"):
        equal = float((answers[name] == answers["fp32"]).mean())
        gate[name] = {"labels_equal": equal, "passed": equal >= LABELS_EQUAL}
    fp32, int8 = graphs / SYSTEMS["fp32"], graphs / SYSTEMS["int8_x86"]
    return {
        "labels": list(metadata.labels),
        "systems": identities(graphs),
        "gate": gate,
        "nonspeech": doubts(metadata, int8),
        "conditions": conditions.rows(metadata, fp32, int8, clips, labelled=False),
    }


def identities(graphs: Path) -> dict[str, dict[str, Any]]:
    """Return the file of each system, and its SHA-256."""
    return {
        name: {"graph": file, "sha256": sha256(graphs / file)} for name, file in SYSTEMS.items()
    }


def doubts(metadata: Metadata, graph: Path, seconds: float = 4.0) -> dict[str, Any]:
    """Say how much of what is no speech is called uncertain.

    Args:
        metadata: Labels, windows, temperature and threshold.
        graph: The ONNX file.
        seconds: Length of a sound.

    Returns:
        ``minutes``, the share that is ``uncertain``, the same ``by_kind``, and the highest
        ``confidence``.
    """
    recognizer = Recognizer(metadata, engine_of(graph))
    rate_hz = metadata.sample_rate_hz
    count = round(NONSPEECH_MINUTES * 60 / seconds)
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    highest = 0.0
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        # Training hears seeds from 0 on.
        prediction = recognizer.predict(sound(kind, 10**6 + number, seconds, rate_hz), rate_hz)
        found[kind].append(prediction.uncertain)
        highest = max(highest, prediction.confidence)
    return {
        "minutes": NONSPEECH_MINUTES,
        "uncertain": float(np.mean([one for of_kind in found.values() for one in of_kind])),
        "by_kind": {kind: float(np.mean(of_kind)) for kind, of_kind in found.items()},
        "confidence": highest,
    }


def check_gate(certificate: Mapping[str, Any]) -> None:
    """Refuse a model that quantization cost too much.

    Raises:
        CertificateError: The gate was missed; the line names classes and layers.
    """
    for name, gate in certificate["gate"].items():
        if gate["passed"]:
            continue
        kept = f"{gate['labels_equal']:.2%} of the labels (allowed: {LABELS_EQUAL:.0%} or more)"
        lost = ""
        if "ua_kept" in gate:
            ua = f"{gate['ua_kept']:.2%} of the UA (allowed: {UA_KEPT:.0%} or more)"
            classes = sorted(gate["recall_lost"], key=gate["recall_lost"].get, reverse=True)[:2]
            kept, lost = f"{ua} and {kept}", f"most recall is lost on {', '.join(classes)}; "
        layers = list(certificate["quantization"]["alone"])[:3]
        raise CertificateError(
            f"{name} keeps {kept}; {lost}INT8 costs most in the layers {', '.join(layers)}"
        )


def make_certificate(
    speech: Speech,
    metadata: Metadata,
    graphs: Path,
    adaptation: Path,
    facts: Mapping[str, Any],
    folder: Path,
) -> None:
    """The stage: ``certificate.json`` and ``certificate.png``.

    Args:
        speech: Whose test clips are scored.
        metadata: Labels, windows and temperature.
        graphs: Folder of the quantization stage.
        adaptation: The file of the training stage.
        facts: What the certificate says beside the scores.
        folder: Takes the files.

    Raises:
        CertificateError: The gate was missed; the certificate is written all the same.
    """
    split = speech.split
    with tqdm(total=len(split.test) * len(SYSTEMS)) as bar:
        network = Adaptation.read(adaptation)
        scores = certify(metadata, graphs, split.test, speech.masks, network, bar)
    told = {
        "test_speakers": sorted(speakers(split.test)),
        "validation_speakers": sorted(speakers(split.validation)),
        "calibration": [f"{clip.corpus}/{clip.path.name}" for clip in split.calibration],
        **facts,
    }
    for name, system in scores["systems"].items():
        tqdm.write(f"test, {name}: {brief(system)}")
    tqdm.write(f"no speech: {scores['nonspeech']['uncertain']:.1%} uncertain")
    write_certificate(metadata, told, scores, folder)


def write_certificate(
    metadata: Metadata, facts: Mapping[str, Any], scores: Mapping[str, Any], folder: Path
) -> None:
    """Write ``certificate.json`` and ``certificate.png``.

    Args:
        metadata: Of the bundle.
        facts: What the certificate says beside the scores.
        scores: What `certify` or `agree` returned.
        folder: Takes the files.

    Raises:
        CertificateError: The gate was missed; the certificate is written all the same.
    """
    version = {"schema_version": metadata.schema_version, "tools": metadata.tools}
    certificate = {**version, **facts, **scores}
    (folder / "certificate.json").write_text(json.dumps(certificate, indent=1) + "\n")
    draw(certificate, folder / "certificate.png")
    check_gate(certificate)
