"""Networks as torch loads them, trained or with random weights, and the graphs made of them.

All of it runs in processes of its own: those that measure other runtimes stay without torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import RATE_HZ, save_random, synthetic_speech
from edge_ser.bundle import FP32_GRAPH, INT8_GRAPH
from edge_ser.errors import EdgeSerError
from edge_ser.external_data import external_files
from export.stage import run_stage

TRAINED = "model.safetensors"
WHISPER_SOURCE = "whisper-base-encoder"
WHISPER = {
    "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "num_mel_bins": 80, "decoder_layers": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 8,
    "vocab_size": 8, "max_target_positions": 4, "begin_suppress_tokens": None,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}  # fmt: skip
"""Whisper-base (arXiv 2212.04356), of its decoder the least that transformers takes."""


@dataclass(frozen=True)
class Origin:
    """How a network comes to be: `save` writes what `load` reads, both in the folder given."""

    save: Callable[[Path], object]
    load: Callable[[Path], Any]


def of_recipe(recipe: Path, pretrained: Path, trained: Path) -> Any:
    """Return the network of a recipe.

    Args:
        recipe: Its file.
        pretrained: Folder of its encoder's checkpoint.
        trained: ``model.safetensors`` of the training stage.

    Raises:
        EdgeSerError: The checkpoint is not there, or does not fit.
    """
    from export.model import load_classifier
    from export.recipe_file import read_recipe

    read = read_recipe(recipe)
    if not (pretrained / read.encoder.source).is_dir():  # or it would be downloaded
        raise EdgeSerError(f"{str(pretrained)!r} has no {read.encoder.source}")
    return load_classifier(read, pretrained, trained).fold_norms()


def save_random_head(recipe: Path, weights: Path, folder: Path) -> None:
    """Keep with random numbers what training would change of a recipe's network.

    Args:
        recipe: Its file; the encoder must be Whisper-base.
        weights: Takes the checkpoint of an encoder with random weights, for several recipes.
        folder: Takes `TRAINED`.

    Raises:
        EdgeSerError: The encoder is another.
    """
    from export.recipe_file import read_recipe

    read = read_recipe(recipe)
    if read.encoder.source != WHISPER_SOURCE:
        raise EdgeSerError(
            f"there are random weights of {WHISPER_SOURCE} only, not of {read.encoder.source!r}; "
            f"measure a run: {read.name}=FOLDER"
        )
    import torch
    from safetensors.torch import save_file

    from export.model import new_classifier, trained_part

    run_stage(weights / WHISPER_SOURCE, {"random": WHISPER}, _save_whisper)
    torch.manual_seed(0)
    network = new_classifier(read, weights)
    save_file(trained_part(read, network).state_dict(), folder / TRAINED)


def _save_whisper(folder: Path) -> None:
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).save_pretrained(folder)


def load_random_head(recipe: Path, weights: Path, folder: Path) -> Any:
    """Return the network of `save_random_head`."""
    return of_recipe(recipe, weights, folder / TRAINED)


def save_random_wav2vec2(size: str, folder: Path) -> None:
    """Save a checkpoint of one of `benchmarks.subjects.SIZES`."""
    save_random(size, folder / "checkpoint")


def load_random_wav2vec2(folder: Path) -> Any:
    """Return the network of `save_random_wav2vec2`."""
    return load_checkpoint(folder / "checkpoint", folder)


def save_nothing(folder: Path) -> None:
    """The weights of a checkpoint that somebody has stay where they are."""


def load_checkpoint(checkpoint: Path, folder: Path) -> Any:
    """Return the network of a checkpoint, wherever its graphs lie."""
    from benchmarks.peers import load_network

    return load_network(checkpoint)[0]


def write_graphs(origin: Origin, folder: Path) -> None:
    """Write all graphs of a network, INT8 with no more steps than give it its form.

    Args:
        origin: Of the network.
        folder: Takes its weights, and the graphs by their names in a bundle.
    """
    import onnx

    from export.graph import export_graph
    from export.half import HALVES, half
    from export.quantize import quantize, write_int8
    from export.recipe import Quantize

    origin.save(folder)
    export_graph(origin.load(folder), {}, RATE_HZ, folder / FP32_GRAPH)
    windows = synthetic_speech(4, 2.0, seed=1)
    plain = Quantize(smoothing=0, turning=False, centring=False, gptq=False, bias_correction=False)
    _, int8, _ = quantize(onnx.load(folder / FP32_GRAPH), windows, plain)
    write_int8(int8, folder)
    for source, name in HALVES.items():
        onnx.save(half(folder / source, windows), folder / name)


def write_half(bundle: Path, folder: Path) -> None:
    """Write the INT8 graph of a bundle with its float parts in half.

    Args:
        bundle: Its folder; values are looked at on the windows of its self-test.
        folder: Takes the graph and its weights.
    """
    import onnx

    from export.half import HALVES, half

    with np.load(bundle / "selftest.npz", allow_pickle=False) as recorded:
        windows = [recorded[name] for name in recorded.files if name.startswith("samples_")]
    onnx.save(half(bundle / INT8_GRAPH, windows), folder / HALVES[INT8_GRAPH])
    for name in external_files(folder / HALVES[INT8_GRAPH]):  # weights that did not change
        shutil.copyfile(bundle / name, folder / name)
