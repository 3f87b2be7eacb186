"""The graphs that `benchmarks.peers` measures: written once, each in a process of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.peers import CALIBRATION_S, PACKAGES, Prepared, load_network
from benchmarks.quantizers import OURS_OF_RANDOM, QUANTIZERS, Quantizer, run_quantizer
from benchmarks.subjects import SIZES, Samples, read_windows, save_random, synthetic_speech
from benchmarks.turns import in_child
from edge_ser.bundle import FP32_GRAPH
from edge_ser.errors import EdgeSerError
from export.checkpoint import CONFIG, read_config
from export.corpora import read_manifest
from export.encoders.wav2vec2 import KINDS
from export.errors import RecipeError
from export.graph import export_graph
from export.stage import fingerprint, run_stage

CALIBRATION = 32
"""Windows to calibrate with, at most."""


def random_checkpoint(size: str, out: Path) -> Path:
    """Return a checkpoint with random weights; one of `benchmarks.subjects.SIZES`."""
    folder = out / f"random_{size}"
    run_stage(folder, SIZES[size], partial(in_child, save_random, size))
    return folder


def calibration_windows(manifest: Path | None) -> list[Samples]:
    """Return the first `CALIBRATION_S` of clips of a manifest, or synthetic ones without it.

    Raises:
        EdgeSerError: The manifest or a clip cannot be used.
    """
    if manifest is None:
        return synthetic_speech(CALIBRATION, CALIBRATION_S, seed=1)
    clips = read_manifest(manifest, ("path",))
    apart = -(-len(clips) // CALIBRATION)  # neighbours are of one speaker, mostly
    return read_windows([clip.path for clip in clips[::apart]], CALIBRATION_S)


def prepare(
    checkpoint: Path, calibration: Sequence[Samples], out: Path, *, random: bool = False
) -> Prepared:
    """Write the graph of full precision, and those of the quantizers.

    Args:
        checkpoint: A folder of transformers: Wav2Vec2, HuBERT or WavLM, with a classifier.
        calibration: Windows of `CALIBRATION_S`, float32 (T,) at 16 kHz.
        out: Takes a folder for each quantizer.
        random: Whether its weights are, so that answers mean nothing.

    Raises:
        RecipeError: The checkpoint cannot be read, or is of another kind.
    """
    kind = read_config(checkpoint).get("model_type")
    if kind not in KINDS:
        raise RecipeError(f"{str(checkpoint / CONFIG)!r}: {kind!r}; allowed are {', '.join(KINDS)}")
    files = fingerprint(file for file in sorted(checkpoint.glob("*")) if file.is_file())
    versions = machine.versions(PACKAGES)
    reads: dict[str, Any] = {"checkpoint": files, "versions": versions}
    key = run_stage(out / "fp32", reads, partial(_write_fp32, checkpoint))
    fp32 = out / "fp32" / FP32_GRAPH
    heard = hashlib.sha256(np.stack(calibration).tobytes()).hexdigest()
    graphs: list[tuple[str, Path, str]] = []
    refused: dict[str, str] = {}
    quantizers = (*QUANTIZERS[:-1], OURS_OF_RANDOM) if random else QUANTIZERS
    for quantizer in tqdm(quantizers, desc="quantize", unit="tool"):
        folder = out / quantizer.name
        reads = {"after": key, "calibration": heard, "settings": dict(quantizer.rows)}
        graphs += [(name, folder / file, detail) for name, (file, detail) in quantizer.rows.items()]
        try:
            run_stage(folder, reads, partial(_quantize, quantizer, fp32, calibration))
            continue
        except BrokenProcessPool:
            reason = "its process died; is the memory full?"
        except Exception as exc:  # that a tool fails on this network is a result, whatever it says
            line = str(exc).partition("\n")[0]
            reason = line if isinstance(exc, EdgeSerError) else f"{type(exc).__name__}: {line}"
        refused |= dict.fromkeys(quantizer.rows, reason)
    return Prepared(checkpoint, fp32, tuple(graphs), refused)


def _write_fp32(checkpoint: Path, folder: Path) -> None:
    network, labels = load_network(checkpoint)
    export_graph(network, {"labels": labels}, 16_000, folder / FP32_GRAPH)


def _quantize(quantizer: Quantizer, fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    in_child(run_quantizer, quantizer, fp32, windows, folder)
