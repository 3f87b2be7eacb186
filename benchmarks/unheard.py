"""Answers of every head of a recipe for the speakers that it has not heard, from many graphs of it.

A recipe's training leaves a head for each fold of its speakers, which has not heard them, and one
that has heard all but the test speakers. Each is quantized with speech of speakers that it has
heard, and asked about the others. So every clip of every speaker is asked once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from benchmarks.integers import exact_engine
from benchmarks.quantizers import QUANTIZERS, run_quantizer
from benchmarks.turns import in_child
from edge_ser.bundle import FP32_GRAPH, X86_GRAPH
from edge_ser.recognizer import Recognizer
from export.conditions import spread_over, under_conditions
from export.corpora import Clip
from export.errors import RecipeError
from export.graph import export_graph
from export.model import load_classifier
from export.pack import describe
from export.probe import Floats
from export.quantize import quantize, quantize_within, write_int8
from export.recipe import Quantize
from export.speech import RATE_HZ, Speech
from export.splits import pooled, speakers
from export.stage import KEY_FILE, fingerprint, run_stage

FP32, OURS = "ONNX FP32", "edge_ser INT8"
PEERS = ("onnxruntime_dynamic", "onnxruntime_static", "modelopt_default")
PEER_WINDOWS, PEER_S = 32, 3.0  # modelopt takes windows of one length only
JUDGED = 200
AS_IT_IS = "as it is"
CONDITIONS, GIVEN_BACK = "conditions.json", "given_back.json"


@dataclass(frozen=True)
class Part:
    """Some speakers, and what is known of the head that has not heard them.

    Attributes:
        head: Its folder.
        asked: Clips of the speakers.
        calibration: Clips of others, to calibrate with.
        judged: Clips of others again, by which layers are left float.
    """

    head: Path
    asked: tuple[Clip, ...]
    calibration: tuple[Clip, ...]
    judged: tuple[Clip, ...]


def parts(speech: Speech, trained: Path) -> list[Part]:
    """Return who is asked of which head, and what else each head may hear.

    Together they ask every clip once; those of the test speakers are asked of the head that is
    shipped. Recordings that two corpora hold are asked once.

    Args:
        speech: Of a recipe with [train].
        trained: The folder of its training stage.

    Raises:
        RecipeError: A head has heard no speaker of the calibration.
    """
    settings, split = speech.recipe.train, speech.split
    assert settings  # only recipes with [train] have folds
    heard = (*split.train, *split.validation)
    fold = split.deal(settings.folds)
    sides = {
        f"fold{number}": [clip for clip, its in zip(heard, fold, strict=True) if its == number]
        for number in range(settings.folds)
    }
    sides["whole"] = list(split.test)
    found = []
    for name, clips in sides.items():
        away = speakers(clips)
        calibration = tuple(clip for clip in split.calibration if clip.speaker_key not in away)
        if not calibration:
            raise RecipeError(
                f"{name}: it has heard none of the speakers that INT8 is calibrated with; "
                "more data.calibration_clips or more train.folds are needed"
            )
        others = set(heard) - set(calibration)
        left = [clip for clip in heard if clip in others and clip.speaker_key not in away]
        judged = tuple(spread_over(left, JUDGED))
        found.append(Part(trained / name, pooled(clips), calibration, judged))
    return found


def answer(
    speech: Speech,
    weights: Path | None,
    temperature: float,
    settings: Mapping[str, Quantize],
    tools: Sequence[str] | None,
    part: Part,
    folder: Path,
) -> dict[str, Any]:
    """Make the graphs of a head and let them answer; what is there already is not made again.

    Args:
        speech: Clips and settings.
        weights: Folder of pretrained checkpoints.
        temperature: Of the answers.
        settings: How INT8 is made, by the name of the system.
        tools: Which of `PEERS` quantize as well; None also leaves out all conditions but clips as
            they are.
        part: The head, and whom to ask.
        folder: Takes a folder a graph, and ``answers``.

    Returns:
        Probs by condition and system in ``conditions``, with the places of the ``clips`` among
        those asked; the layers that each system has ``given_back``; why tools ``refused``.
    """
    trained = part.head / "model.safetensors"

    def export(folder: Path) -> None:
        model = load_classifier(speech.recipe, weights, trained).fold_norms()
        export_graph(model, {"labels": speech.labels}, RATE_HZ, folder / FP32_GRAPH)

    reads: dict[str, Any] = {"head": fingerprint([trained]), "encoder": speech.recipe.encoder}
    key = run_stage(folder / "graph", reads, export)
    files, refused = {FP32: folder / "graph" / FP32_GRAPH}, {}
    calibration = speech.first_windows(part.calibration)
    judged = speech.first_windows(part.judged)
    for name, how in settings.items():
        make = partial(_quantize, files[FP32], calibration, judged, how)
        run_stage(folder / name, {"after": key, "quantize": how}, make)
        files[name] = folder / name / X86_GRAPH
    windows = [np.resize(window, round(PEER_S * RATE_HZ)) for window in calibration]
    windows = windows[:: -(-len(windows) // PEER_WINDOWS)]
    for tool in QUANTIZERS:
        if tool.name not in (tools or ()):
            continue
        (row, (file, _)), *_ = tool.rows.items()
        make = partial(in_child, run_quantizer, tool, files[FP32], windows)
        try:
            run_stage(folder / tool.name, {"after": key}, make)
            files[row] = folder / tool.name / file
        except Exception as exc:  # that a tool fails on this network is a result
            refused[row] = str(exc).partition("\n")[0]
    answered = {}
    for name, file in files.items():
        # A stage each: what a new quantizer does to one system is not asked of all others again.
        home = folder / f"answers of {name}"
        graph = sorted(part for part in file.parent.iterdir() if part.name != KEY_FILE)
        reads = {"graph": fingerprint(graph), "asked": temperature}
        make = partial(_ask, speech, temperature, part, name, file, tools is not None)
        run_stage(home, {**reads, "conditions": tools is not None}, make)
        answered[name] = {
            condition: json.loads((home / f"{condition}.json").read_text())
            for condition in json.loads((home / CONDITIONS).read_text())
        }
    given_back = {name: json.loads((folder / name / GIVEN_BACK).read_text()) for name in settings}
    conditions = {
        condition: {
            "clips": one["clips"],
            "probs": {name: by[condition]["probs"] for name, by in answered.items()},
        }
        for condition, one in answered[FP32].items()
    }
    return {"conditions": conditions, "given_back": given_back, "refused": refused}


def _quantize(
    fp32: Path,
    windows: Sequence[Floats],
    judged: Sequence[Floats],
    settings: Quantize,
    folder: Path,
) -> None:
    model = onnx.load(fp32)
    given_back: list[str] = []
    if settings.most_float:
        made = quantize_within(model, windows, judged, settings)
        int8, given_back = made.int8, made.given_back
    else:
        _, int8, _ = quantize(model, windows, settings)
    write_int8(int8, folder, given_back)
    (folder / GIVEN_BACK).write_text(json.dumps(given_back))


def _ask(
    speech: Speech,
    temperature: float,
    part: Part,
    system: str,
    file: Path,
    conditions: bool,
    folder: Path,
) -> None:
    """Ask a graph; conditions that a stopped run has asked already are left as they are."""
    metadata = describe(speech, {"temperature": temperature, "abstain_below": 0.0}, None)
    recognizer = Recognizer(metadata, exact_engine(file))
    places = {clip: place for place, clip in enumerate(part.asked)}
    asked = []
    for condition, heard in under_conditions(part.asked, RATE_HZ):
        if condition != AS_IT_IS and not conditions:
            continue
        asked.append(condition)
        if (answers := folder / f"{condition}.json").exists():
            continue
        name = f"{part.head.name}, {system}, {condition}"
        probs = [
            list(recognizer.answer(*recognizer.run(samples, RATE_HZ)).probs.values())
            for _, samples in tqdm(heard, desc=name, unit="clip")
        ]
        found = {"clips": [places[clip] for clip, _ in heard], "probs": probs}
        begun = answers.with_suffix(".partial")
        begun.write_text(json.dumps(found))
        begun.rename(answers)
    (folder / CONDITIONS).write_text(json.dumps(asked))
