"""What `benchmarks gpu` measures: networks in every precision, as graphs and as torch loads them.

Trained ones come from the folder of a run or of a bundle. Without one, a network of the same shape
gets random weights, which say nothing but take as long; the embedded INT8 models are trained.

<out>/<name>/embedded     the embedded INT8 model, its float parts in half
<out>/<name>/random       graphs of random weights, and the weights
<out>/<name>/made         graphs of a checkpoint
<out>/weights             an encoder of the size of Whisper-base, random too
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.processes import alone
from benchmarks.subject_networks import (
    TRAINED,
    Origin,
    load_checkpoint,
    load_random_head,
    load_random_wav2vec2,
    of_recipe,
    save_nothing,
    save_random_head,
    save_random_wav2vec2,
    write_graphs,
    write_half,
)
from benchmarks.subjects import SIZES
from edge_ser.bundle import (
    FP32_GRAPH,
    GPU_GRAPHS,
    INT8_GRAPH,
    MODELS,
    Bundle,
    Metadata,
    sha256,
)
from edge_ser.engines.plans import digest
from edge_ser.errors import BundleError, EdgeSerError
from edge_ser.external_data import external_files
from export.stage import fingerprint, run_stage

RECIPES = ROOT / "export" / "recipes"
WAV2VEC2 = {"wav2vec2_base": "base", "wav2vec2_xlsr": "xlsr"}
"""Names of networks that are no recipe, and their sizes in `benchmarks.subjects.SIZES`."""


@dataclass(frozen=True)
class Weights:
    """One set of weights, in all forms that there are of it.

    Attributes:
        source: Where they are from.
        reference: The graph whose answers on the processor the others are held against.
        metadata: Of the bundle; None where nobody says that they are trained.
    """

    source: str
    reference: Path
    metadata: Metadata | None


@dataclass(frozen=True)
class Graph:
    """An ONNX graph that says its types itself, its weights, and the SHA-256 of all its files."""

    file: Path
    weights: Weights
    sha256: str


@dataclass(frozen=True)
class Network:
    """What loads a network into torch, its weights, and the SHA-256 of what they are made of."""

    load: Callable[[], Any]
    weights: Weights
    sha256: str


@dataclass(frozen=True)
class Model:
    """A network to measure.

    Attributes:
        name: As the command line has it.
        graphs: By precision; a text says why there is none.
        network: Of torch; a text says why there is none.
    """

    name: str
    graphs: Mapping[str, Graph | str]
    network: Network | str


def known_models() -> list[str]:
    """Return the names that need no folder."""
    return [*sorted(file.stem for file in RECIPES.glob("*.toml")), *WAV2VEC2]


def model_of(name: str, folder: Path | None, out: Path, pretrained: Path | None) -> Model:
    """Return a model; what is not there yet is made, in a process of its own.

    Args:
        name: One of `known_models`; with a folder, any.
        folder: Of a run (``<out>/<name>/seed<N>`` of ``python -m export run``), of a bundle, of
            graphs called as in a bundle, or a checkpoint of transformers; None means random
            weights, and the embedded INT8 model where there is one.
        out: Takes what is made.
        pretrained: Folder of pretrained checkpoints, for torch to load the network of a run.

    Raises:
        BundleError: The folder holds nothing of that.
    """
    if folder is None:
        return _without_folder(name, out / name, out / "weights")
    if (folder / "config.json").is_file():
        origin = Origin(save_nothing, partial(load_checkpoint, folder))
        files = sorted(file for file in folder.iterdir() if file.is_file())
        source = f"{folder}, INT8 calibrated with synthetic sounds"
        return _made(name, out / name / "made", source, origin, {"made": fingerprint(files)})
    place = folder / "bundle" if (folder / "bundle").is_dir() else folder
    metadata = Bundle.open(place).metadata if (place / "metadata.json").is_file() else None
    weights, graphs = _graphs_in(place, str(folder), metadata)
    return Model(name, graphs, _trained_network(name, folder, weights, pretrained))


def _without_folder(name: str, home: Path, weights: Path) -> Model:
    if name in WAV2VEC2:
        size = WAV2VEC2[name]
        origin = Origin(partial(save_random_wav2vec2, size), load_random_wav2vec2)
        reads: dict[str, Any] = {"random": SIZES[size]}
    else:
        recipe = RECIPES / f"{name}.toml"
        how = (recipe, weights)
        origin = Origin(partial(save_random_head, *how), partial(load_random_head, *how))
        reads = {"random": recipe.read_text(encoding="utf-8")}
    model = _made(name, home / "random", "random weights", origin, reads)
    if not (MODELS / name).is_dir():
        return model
    return Model(name, {**model.graphs, "int8": _embedded(name, home / "embedded")}, model.network)


def _made(name: str, folder: Path, source: str, origin: Origin, reads: dict[str, Any]) -> Model:
    """Return a model whose graphs are made of a network that torch loads."""
    try:
        key = _stage(folder, reads, partial(write_graphs, origin))
    except EdgeSerError as exc:
        return Model(name, dict.fromkeys(GPU_GRAPHS, str(exc)), str(exc))
    weights, graphs = _graphs_in(folder, source, None)
    return Model(name, graphs, Network(partial(origin.load, folder), weights, key))


def _embedded(name: str, folder: Path) -> Graph | str:
    """Return the INT8 graph of an embedded bundle with its float parts in half."""
    bundle = Bundle.open(name)
    try:
        key = {"bundle": sha256(bundle.path / "metadata.json")}
        _stage(folder, key, partial(write_half, bundle.path))
    except EdgeSerError as exc:
        return str(exc)
    weights = Weights("the embedded model", bundle.path / INT8_GRAPH, bundle.metadata)
    return _graph(folder / GPU_GRAPHS["int8"][0], weights)


def _stage(folder: Path, reads: dict[str, Any], write: Callable[[Path], None]) -> str:
    """Fill a folder, if that was not done before; return the key of what is in it."""
    return run_stage(folder, reads, partial(alone, write))


def _graphs_in(
    place: Path, source: str, metadata: Metadata | None
) -> tuple[Weights, dict[str, Graph | str]]:
    """Return the graphs of a folder that are called as in a bundle."""
    candidates = (FP32_GRAPH, INT8_GRAPH)
    reference = next((place / name for name in candidates if (place / name).is_file()), None)
    if reference is None:
        raise BundleError(
            f"{str(place)!r} holds none of {', '.join(candidates)} and config.json; needed is the "
            "folder of a run, a bundle, or a checkpoint of transformers"
        )
    weights = Weights(source, reference, metadata)
    graphs: dict[str, Graph | str] = {}
    for precision, names in GPU_GRAPHS.items():
        file = next((place / name for name in names if (place / name).is_file()), None)
        graphs[precision] = _graph(file, weights) if file else f"{place} has no {names[-1]}"
    return weights, graphs


def _graph(file: Path, weights: Weights) -> Graph:
    files = [file, *(file.parent / name for name in sorted(external_files(file)))]
    return Graph(file, weights, digest([sha256(one) for one in files]))


def _trained_network(
    name: str, folder: Path, weights: Weights, pretrained: Path | None
) -> Network | str:
    trained, recipe = folder / "train" / TRAINED, RECIPES / f"{name}.toml"
    if not (trained.is_file() and recipe.is_file()):
        return f"torch needs the folder of a run of a recipe, and {folder} is none of {name!r}"
    if pretrained is None:
        return "torch needs --weights, the pretrained encoder"
    return Network(partial(of_recipe, recipe, pretrained, trained), weights, sha256(trained))
