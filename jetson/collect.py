"""What ``bench.sh`` has measured, put into one JSON object.

``python -m jetson.collect clips MANIFEST BUNDLE`` prints the paths of the clips, a zero byte behind
each; ``python -m jetson.collect result FOLDER [MANIFEST]`` prints the result.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.machine import provenance
from edge_ser.bundle import Bundle
from edge_ser.engines.build import tensorrt_module
from edge_ser.errors import EdgeSerError, MissingDependency
from edge_ser.verification import read_clips

SCHEMA_VERSION = 1
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "soundfile", "soxr")


def result(folder: Path, manifest: Path | None = None) -> dict[str, Any]:
    """Return the JSON object of a result.

    Args:
        folder: What ``bench.sh`` has kept.
        manifest: CSV of the clips that were scored, if any were.

    Raises:
        AudioError: The manifest cannot be read.
    """
    bundle = json.loads((folder / "bundle.json").read_text())
    emotions: dict[str, str] = {}
    if manifest:
        clips = read_clips(manifest, tuple(bundle["labels"]))
        emotions = {str(path): emotion for path, emotion in clips}
    found = provenance(PACKAGES)
    found["machine"] |= board(folder) | state(folder)
    found["versions"]["tensorrt"] = tensorrt_version()
    return {
        "schema_version": SCHEMA_VERSION,
        **found,
        "bundle": bundle,
        "cells": [cell(one, emotions) for one in sorted((folder / "cells").iterdir())],
        "verify": {name: answer(folder / f"verify_{name}") for name in ("tensorrt", "onnx")},
    }


def board(folder: Path, root: Path = Path("/")) -> dict[str, Any]:
    """Return what the board is and holds; None where it does not say.

    Args:
        folder: See `result`.
        root: Of the board's file system.
    """
    # "# R36 (release), REVISION: 4.3, GCID: ..." is Jetson Linux 36.4.3
    release = re.match(
        r"# R(\d+) \(release\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release")
    )
    cuda = re.search(
        r'"cuda" *: *{[^}]*"version" *: *"([^"]+)', text(root / "usr/local/cuda/version.json")
    )
    return {
        "board": text(root / "proc/device-tree/model") or None,
        "jetpack": text(folder / "jetpack") or None,
        "l4t": ".".join(release.groups()) if release else None,
        "cuda": cuda[1] if cuda else None,
    }


def state(folder: Path) -> dict[str, Any]:
    """Return power mode, clocks, temperatures and memory; None where the board does not say.

    ``clocks_locked`` is whether ``jetson_clocks`` holds processor and GPU at one frequency each;
    ``not_read`` says why something that is there could not be read.

    Args:
        folder: See `result`.
    """
    mode = re.search(r"NV Power Mode: (\S+)\s+(\d+)", text(folder / "nvpmodel"))
    clocks = text(folder / "jetson_clocks")
    ranges = re.findall(r"^(?:cpu|GPU).* MinFreq=(\d+) MaxFreq=(\d+)", clocks, re.MULTILINE)
    return {
        "power_mode": mode[1] if mode else None,
        "power_mode_id": int(mode[2]) if mode else None,
        "clocks_locked": all(low == high for low, high in ranges) if ranges else None,
        "nvpmodel": text(folder / "nvpmodel").splitlines(),
        "jetson_clocks": clocks.splitlines(),
        "tegrastats_before": text(folder / "before") or None,
        "tegrastats_after": text(folder / "after") or None,
        "not_read": {
            name: error
            for name in ("nvpmodel", "jetson_clocks", "jetpack", "before", "after")
            if not text(folder / name) and (error := last_line(folder / f"{name}.error"))
        },
    }


def tensorrt_version() -> str | None:
    """Return name and version of TensorRT, e.g. ``"tensorrt 10.3.0"``; None where it is not."""
    try:
        module = tensorrt_module()
    except MissingDependency:
        return None
    return f"{module.__name__} {module.__version__}"


def cell(folder: Path, emotions: dict[str, str]) -> dict[str, Any]:
    """Return one way to compute: what was asked, and what was found or the ``error``.

    Args:
        folder: Of the cell.
        emotions: Of each clip, by path, empty where it is not known.
    """
    engine, precision, threads = (folder / "asked").read_text().splitlines()
    asked = {"engine": engine, "precision": precision, "threads": int(threads) if threads else None}
    built = answer(folder / "build")
    timed = built if built and "error" in built else answer(folder / "bench")
    if "error" in timed:
        return asked | timed
    energy = answer(folder / "energy")
    return asked | {
        "build": built,
        "bench": timed,
        "memory_taken_mb": memory_taken_mb(folder / "available_kb"),
        "energy": energy.get("energy", energy),
        "accuracy": accuracy(folder, emotions) if emotions else None,
    }


def answer(file: Path) -> Any:
    """Return what edge_ser has answered, or its ``error``; None where it was not asked.

    Args:
        file: Of the answer, without its ending.
    """
    if found := text(file.with_suffix(".json")):
        return json.loads(found)
    error = last_line(file.with_suffix(".error"))
    return {"error": error} if error else None


def memory_taken_mb(file: Path) -> float:
    """Return by how much the available memory fell, in MB of 10^6 bytes.

    On a Jetson that is the memory of processor and GPU together, of whatever ran meanwhile.

    Args:
        file: Readings in kB of 1024 bytes, the first one before the cell began.
    """
    readings = [int(reading) for reading in text(file).split()]
    return round((readings[0] - min(readings)) * 1024 / 1e6, 1)


def accuracy(folder: Path, emotions: dict[str, str]) -> dict[str, Any]:
    """Return how many clips were named rightly; one that was refused is a wrong answer.

    Args:
        folder: Of the cell.
        emotions: Of each clip, by path, empty where it is not known.

    Returns:
        ``clips``, ``refused``, ``ua`` (the mean recall of the emotions that occur) and ``wa``; or
        the ``error``.
    """
    rows = [json.loads(line) for line in text(folder / "predict.json").splitlines()]
    if not rows:
        return {"error": last_line(folder / "predict.error")}
    labels = {row["file"]: row.get("label") for row in rows}
    right = defaultdict(list)
    for path, emotion in emotions.items():
        if emotion:
            right[emotion].append(labels.get(path) == emotion)
    every = [one for values in right.values() for one in values]
    return {
        "clips": len(every),
        "refused": sum(labels.get(path) is None for path in emotions),
        "ua": fmean(fmean(values) for values in right.values()) if right else None,
        "wa": fmean(every) if every else None,
    }


def text(file: Path) -> str:
    """Return what a file says, nothing where it is not there or must not be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def last_line(file: Path) -> str:
    """Return the last line of a file, nothing where there is none."""
    return text(file).rpartition("\n")[2]


def main(what: str, *args: str) -> int:
    """Do what the module's docstring says; return the exit status."""
    try:
        if what == "clips":
            manifest, bundle = args
            labels = Bundle.open(bundle).metadata.labels
            print(*(path for path, _ in read_clips(Path(manifest), labels)), sep="\0", end="\0")
        else:
            folder, *manifests = map(Path, args)
            print(json.dumps(result(folder, *manifests), indent=1))
    except EdgeSerError as exc:
        print(f"bench.sh: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
