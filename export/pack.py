"""The bundle: everything that the runtime needs in one folder, nothing that it does not."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from edge_ser import audio
from edge_ser.bundle import Bundle, BundleFile, Metadata, sha256
from edge_ser.engines.onnx import OnnxEngine

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "soxr")
SELFTEST_S = (0.5, 1.5, 3.0)


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that make a bundle."""
    return {name: packages.version(name) for name in TOOLS}


def write_selftest(graphs: Path, sample: Path, rate_hz: int, file: Path) -> None:
    """Record the logits of every graph on parts of a clip that may be shipped.

    Args:
        graphs: Folder of ONNX files.
        sample: A synthesised clip.
        rate_hz: Of the graphs.
        file: The ``.npz`` to write: ``samples_<i>`` (T,), ``<graph>_<i>`` (C,), float32.
    """
    samples = audio.read(sample, rate_hz=rate_hz)
    parts = [samples[: round(seconds * rate_hz)] for seconds in SELFTEST_S]
    arrays = {f"samples_{i}": part for i, part in enumerate(parts)}
    for graph in sorted(graphs.glob("model*.onnx")):
        engine = OnnxEngine(graph, threads=1)
        arrays |= {f"{graph.stem}_{i}": engine.run(part[None])[0] for i, part in enumerate(parts)}
    np.savez_compressed(file, **arrays)


def pack(metadata: Metadata, graphs: Path, certificate: Path, sample: Path, folder: Path) -> Bundle:
    """Fill a folder with a bundle and open it as a user would.

    Args:
        metadata: All but ``files``.
        graphs: Folder of the full-precision and INT8 graphs.
        certificate: Folder of ``certificate.json`` and ``.png``.
        sample: The clip of the self-test.
        folder: Takes the bundle.

    Returns:
        The checked bundle.
    """
    for file in (*graphs.glob("model*"), *certificate.glob("certificate.*")):
        shutil.copyfile(file, folder / file.name)
    write_selftest(graphs, sample, metadata.sample_rate_hz, folder / "selftest.npz")
    document = json.loads((certificate / "certificate.json").read_text())
    (folder / "README.md").write_text(model_card(metadata, document), encoding="utf-8")
    names = ("README.md", "certificate.json", "certificate.png", "selftest.npz")
    files = sorted({*names, *(file.name for file in folder.glob("model*"))})
    entries = {
        name: BundleFile(sha256(folder / name), required=name != "model.onnx") for name in files
    }
    whole = replace(metadata, files=entries)
    (folder / "metadata.json").write_text(json.dumps(whole.to_json(), indent=1) + "\n")
    return Bundle.open(folder)


def model_card(metadata: Metadata, certificate: Mapping[str, Any]) -> str:
    """Return the bundle's README: what it is, what it scored, what it must not be used for."""
    fp32, int8 = (certificate["systems"][name] for name in ("fp32", "int8_x86"))

    def cell(interval: Mapping[str, Any]) -> str:
        return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"

    rows = [
        f"| {name} | {row['clips']} | {len(row['speakers'])} | {cell(row['masked']['ua'])} | "
        f"{cell(int8['corpora'][name]['masked']['ua'])} |"
        for name, row in fp32["corpora"].items()
    ]
    rows.append(
        f"| pooled, all labels | {fp32['pooled']['clips']} | | {cell(fp32['pooled']['ua'])} | "
        f"{cell(int8['pooled']['ua'])} |"
    )
    gate = certificate["gate"]["int8_x86"]
    corpora = [f"- {c['name']} ({c['language']}): {c['licence']}. {c['source']}" for c in
               metadata.corpora]  # fmt: skip
    languages = sorted({corpus["language"] for corpus in metadata.corpora})
    front = ["---", "library_name: edge-ser", "pipeline_tag: audio-classification"]
    front += [f"language: [{', '.join(languages)}]", "license: other", "---"]
    return "\n".join(
        [
            *front,
            "",
            f"# {metadata.name}",
            "",
            f"Speech emotion recognition: {', '.join(metadata.labels)}. INT8 ONNX for CPUs, made "
            "and certified by edge_ser.",
            "",
            f"Encoder: `{json.dumps(metadata.encoder)}`. Head: `{json.dumps(metadata.head)}`. "
            f"Teacher: `{json.dumps(metadata.teacher)}`.",
            "",
            "## Scores",
            "",
            "Unweighted accuracy on test speakers that nothing was trained or chosen on; 95 % "
            "bootstrap intervals. Masked to the labels of each corpus; pooled among all labels.",
            "",
            "| corpus | clips | speakers | full precision | INT8 |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"INT8 gives the same label as full precision on {gate['labels_equal']:.1%} of the "
            f"clips and keeps {gate['ua_kept']:.1%} of the pooled UA. Seed {certificate['seed']}. "
            "`certificate.json` has everything else.",
            "",
            "## Limits",
            "",
            "Trained on acted and broadcast speech of few speakers. It tells how speech sounds, "
            "not what a person feels. Not for judging people, for hiring, schooling, policing or "
            "health.",
            "",
            "## Corpora",
            "",
            *corpora,
            "",
            "Several of them allow research only or no commercial use; that carries over to these "
            "weights.",
            "",
        ]
    )
