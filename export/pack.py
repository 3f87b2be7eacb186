"""The bundle: everything that the runtime needs in one folder, nothing that it does not."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from edge_ser import audio
from edge_ser.bundle import ADAPTATION, FP32_GRAPH, Bundle, BundleFile, Metadata, sha256
from edge_ser.samples import sample_paths
from export import corpora
from export.card import model_card
from export.half import HALVES
from export.probe import engine_of
from export.speech import RATE_HZ, Speech

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "soxr")
SELFTEST_S = (0.5, 1.5, 3.0)
OPTIONAL = {FP32_GRAPH, *HALVES.values(), ADAPTATION}


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that make a bundle."""
    return {name: packages.version(name) for name in TOOLS}


def write_selftest(graphs: Path, sample: Path, rate_hz: int, window_s: float, file: Path) -> None:
    """Record the logits of every graph on parts of a clip that may be shipped.

    Args:
        graphs: Folder of ONNX files.
        sample: A synthesised clip.
        rate_hz: Of the graphs.
        window_s: The longest window that the graphs take, in seconds.
        file: The ``.npz`` to write: ``samples_<i>`` (T,), ``<graph>_<i>`` (C,), float32. A graph in
            half has to answer on a GPU as the one that it is made of does here.
    """
    samples = audio.read(sample, rate_hz=rate_hz)
    lengths_s = sorted({min(seconds, window_s) for seconds in SELFTEST_S})
    parts = [samples[: round(seconds * rate_hz)] for seconds in lengths_s]
    arrays = {f"samples_{i}": part for i, part in enumerate(parts)}
    sources = {half: source for source, half in HALVES.items()}
    for graph in sorted(graphs.glob("model*.onnx")):
        engine = engine_of(graph.with_name(sources.get(graph.name, graph.name)), threads=1)
        arrays |= {f"{graph.stem}_{i}": engine.run(part[None])[0] for i, part in enumerate(parts)}
    np.savez_compressed(file, **arrays)


def make_bundle(
    metadata: Metadata, graphs: Path, certificate: Path, adaptation: Path | None, folder: Path
) -> None:
    """The stage: fill a folder with a bundle, and open it as a user would.

    Args:
        metadata: All but ``files``.
        graphs: Folder of the graphs.
        certificate: Folder of ``certificate.json`` and ``.png``.
        adaptation: The file of the training stage, if there is one.
        folder: Takes the bundle.

    Raises:
        BundleError: The runtime would refuse it.
    """
    for file in (*graphs.glob("model*"), *certificate.glob("certificate.*")):
        shutil.copyfile(file, folder / file.name)
    sample = sample_paths()[0]
    rate_hz, window_s = metadata.sample_rate_hz, metadata.window_s
    write_selftest(graphs, sample, rate_hz, window_s, folder / "selftest.npz")
    document = json.loads((certificate / "certificate.json").read_text())
    (folder / "README.md").write_text(model_card(metadata, document), encoding="utf-8")
    names = {"README.md", "certificate.json", "certificate.png", "selftest.npz"}
    if adaptation:
        shutil.copyfile(adaptation, folder / ADAPTATION)
        names.add(ADAPTATION)
    files = sorted({*names, *(file.name for file in folder.glob("model*"))})
    entries = {
        name: BundleFile(sha256(folder / name), required=name not in OPTIONAL) for name in files
    }
    whole = replace(metadata, files=entries)
    (folder / "metadata.json").write_text(json.dumps(whole.to_json(), indent=1) + "\n")
    Bundle.open(folder)


def describe(
    speech: Speech, confidence: Mapping[str, Any], teacher: Mapping[str, Any] | None
) -> Metadata:
    """Return what a bundle says about itself, all but its files.

    Args:
        speech: Recipe and corpora.
        confidence: Temperature and threshold.
        teacher: What it was distilled from.
    """
    recipe = speech.recipe
    return Metadata(
        name=recipe.name,
        labels=recipe.data.labels,
        sample_rate_hz=RATE_HZ,
        window_s=recipe.windows.window_s,
        hop_s=recipe.windows.hop_s,
        temperature=confidence["temperature"],
        abstain_below=confidence["abstain_below"],
        certified=True,  # a model that misses the gate does not come so far
        encoder={key: value for key, value in asdict(recipe.encoder).items() if value},
        head=asdict(recipe.head),
        teacher=dict(teacher) if teacher else None,
        corpora=tuple(corpora.describe((*speech.clips, *speech.unlabelled))),
        tools=tool_versions(),
        files={},
    )
