"""Checkpoints of transformers, read strictly: from a folder or a hub id, no tensor made up."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from export.errors import RecipeError

CONFIG = "config.json"
EXTRACTOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where the tensors lie; the first that is there is read. Each may be cut, with an index beside."""

RENAMED = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
"""Names that torch's weight normalization had before 2.0, and has now."""


def locate(source: str, weights: Path | None = None) -> Path:
    """Return the folder of a checkpoint, fetched from the hub where it is not on this machine.

    Args:
        source: A folder, a folder under ``weights``, or a hub id.
        weights: Folder of checkpoints.

    Raises:
        RecipeError: There is none.
    """
    for folder in (weights / source if weights else None, Path(source)):
        if folder and folder.is_dir():
            return folder
    try:
        folder = Path(snapshot_download(source, allow_patterns=[CONFIG, EXTRACTOR]))
        for name in WEIGHTS:  # half of the older checkpoints hold both: one is enough
            stem, _, ending = name.rpartition(".")
            patterns = [name, f"{stem}-*.{ending}", f"{name}.index.json"]
            snapshot_download(source, allow_patterns=patterns)
            if _parts(folder, name):
                break
    except (OSError, ValueError) as exc:  # the bases of all that the hub raises
        line = str(exc).partition("\n")[0]
        raise RecipeError(
            f"no checkpoint {source!r}: neither a folder under --weights nor a hub id ({line})"
        ) from exc
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        RecipeError: It is not there, or not JSON.
    """
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise _unreadable(folder, exc) from exc


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors, floating ones as float32, under the names that torch gives them now.

    Raises:
        RecipeError: There are none, or a file cannot be read.
    """
    for name in WEIGHTS:
        files = _parts(folder, name)
        if files:
            break
    else:
        raise _unreadable(folder, "no weights")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
            raise _unreadable(folder, exc) from exc
    named = {}
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        name = f"{parent}.{RENAMED[last]}" if last in RENAMED else name
        named[name] = tensor.float() if tensor.is_floating_point() else tensor
    return named


def _unreadable(folder: Path, reason: object) -> RecipeError:
    line = str(reason).partition("\n")[0]
    return RecipeError(
        f"checkpoint {str(folder)!r} cannot be read ({line}); it needs {CONFIG} and "
        f"{' or '.join(WEIGHTS)}"
    )


def _parts(folder: Path, name: str) -> list[Path]:
    """Return the files that hold the tensors, one or the parts of an index; none if not there."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        return []
    return [
        folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))
    ]


def fill(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, made: Collection[str] = ()
) -> None:
    """Copy tensors into a module, every one accounted for.

    Args:
        module: Takes them.
        tensors: By the names in the module.
        source: The checkpoint, for messages.
        made: Names in the module that no checkpoint has.

    Raises:
        RecipeError: A tensor is missing, has another shape, or the module has no place for it.
    """
    places = {name: value for name, value in module.state_dict().items() if name not in made}
    missing, unexpected = places.keys() - tensors.keys(), tensors.keys() - places.keys()
    if missing or unexpected:
        raise RecipeError(
            f"{source}: missing tensors {sorted(missing)[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}; the checkpoint of such a network is needed"
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise RecipeError(
                f"{source}: {name} has the shape {tuple(tensors[name].shape)}, its config asks for "
                f"{tuple(place.shape)}"
            )
    module.load_state_dict(tensors, strict=False)
