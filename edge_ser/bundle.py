"""The bundle: one folder that holds everything a model needs, checked when it is opened.

A bundle is data only. ``metadata.json`` describes it and lists every file with its SHA-256;
files that it does not list are ignored.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import platform
from dataclasses import dataclass
from pathlib import Path

from edge_ser.errors import BundleError
from edge_ser.external_data import external_files
from edge_ser.metadata import SCHEMA_VERSION, BundleFile, Metadata

__all__ = ["SCHEMA_VERSION", "Bundle", "BundleFile", "Metadata"]

MODELS = Path(__file__).parent / "models"  # the bundles inside the wheel

INT8_GRAPH = "model_int8.onnx"  # signed activations: ARM, TensorRT
X86_GRAPH = "model_int8_x86.onnx"  # the same model with unsigned activations
FP32_GRAPH = "model.onnx"
# For a GPU the float parts of INT8 are in half, where the bundle holds that graph.
GPU_GRAPHS = {
    "int8": ("model_int8_fp16.onnx", INT8_GRAPH),
    "fp16": ("model_fp16.onnx",),
    "fp32": (FP32_GRAPH,),
}
ADAPTATION = "adaptation.json"  # optional: how to adapt to a speaker

_COPY = "get a complete copy"
_EXPORT = "export it with `python -m export run RECIPE`, or use int8"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose metadata and hashes have been checked.

    Attributes:
        path: The folder.
        metadata: Its ``metadata.json``.
    """

    path: Path
    metadata: Metadata

    @classmethod
    def open(cls, bundle: str | Path = "default") -> Bundle:
        """Open a bundle and check it.

        Args:
            bundle: The name of an embedded bundle, or the path of a folder.

        Raises:
            BundleError: There is none, or anything about it is wrong.
        """
        path = _locate(bundle)
        try:
            document = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        except OSError as exc:
            raise BundleError(f"bundle {str(path)!r} has no readable metadata.json") from exc
        except (ValueError, RecursionError) as exc:  # ValueError: bytes that are no text, too
            line = f"bundle {str(path)!r}: metadata.json is not JSON ({exc})"
            raise BundleError(line) from exc
        try:
            metadata = Metadata.from_json(document)
        except BundleError as exc:
            raise BundleError(f"bundle {str(path)!r}: metadata.json: {exc}") from exc
        opened = cls(path, metadata)
        for name, entry in metadata.files.items():
            if entry.required or (path / name).exists():
                file = opened.file(name)
                if sha256(file) != entry.sha256:
                    raise BundleError(
                        f"{str(file)!r} was changed: its SHA-256 is not the listed one; {_COPY}"
                    )
        return opened

    def file(self, name: str, advice: str = _COPY) -> Path:
        """Return the path of a listed file that is there.

        Args:
            name: Its name.
            advice: What to do if it is not there.

        Raises:
            BundleError: It is not listed, not there, or a link that leaves the bundle.
        """
        file = self.path / name
        if name not in self.metadata.files or not file.is_file():
            raise BundleError(f"bundle {str(self.path)!r} has no {name!r}; {advice}")
        if file.resolve().parent != self.path.resolve():
            raise BundleError(f"{str(file)!r} is a link that leaves the bundle; copy the file in")
        return file

    def graph(self, precision: str = "int8", machine: str | None = None) -> Path:
        """Return the graph for a precision and a processor.

        Args:
            precision: ``"int8"`` or ``"fp32"``.
            machine: As `platform.machine` names it; None means this one.

        Raises:
            BundleError: The bundle does not hold it, or it reads weights from an unlisted file.
        """
        if precision not in ("int8", "fp32"):
            raise BundleError(f"precision is {precision!r}; allowed: 'int8', 'fp32'")
        x86 = (machine or platform.machine()) in ("x86_64", "AMD64")
        name = FP32_GRAPH if precision == "fp32" else X86_GRAPH if x86 else INT8_GRAPH
        graph = self.file(name, _EXPORT if precision == "fp32" else _COPY)
        self._weights(graph)
        return graph

    def gpu_graph(self, precision: str = "int8") -> tuple[Path, list[str]]:
        """Return the graph for a GPU, and the SHA-256 of it and of the weights that it reads.

        Args:
            precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.

        Raises:
            BundleError: As of `graph`.
        """
        if precision not in GPU_GRAPHS:
            raise BundleError(f"precision is {precision!r}; allowed: {', '.join(GPU_GRAPHS)}")
        *better, name = GPU_GRAPHS[precision]
        name = next((one for one in better if (self.path / one).exists()), name)
        graph = self.file(name, _COPY if precision == "int8" else _EXPORT)
        files = [name, *self._weights(graph)]
        return graph, [self.metadata.files[file].sha256 for file in files]

    def _weights(self, graph: Path) -> list[str]:
        """Return the files beside a graph that hold its weights; refuse unlisted ones."""
        locations = sorted(external_files(graph))
        for location in locations:
            if location not in self.metadata.files:
                raise BundleError(
                    f"{str(graph)!r} reads weights from {location!r}; "
                    "allowed: files that metadata.json lists"
                )
        return locations


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if file.stat().st_size:  # an empty file cannot be mapped
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                digest.update(whole)
    return digest.hexdigest()


def _locate(bundle: str | Path) -> Path:
    """Return the folder of a bundle: embedded names first, then paths."""
    embedded = sorted(path.parent.name for path in MODELS.glob("*/metadata.json"))
    if bundle in embedded:
        return MODELS / bundle
    if Path(bundle).is_dir():
        return Path(bundle)
    names = ", ".join(embedded) or "none"
    raise BundleError(f"no bundle {str(bundle)!r}; allowed: a folder, or an embedded one ({names})")
