"""How far a quantized network is from full precision: labels, and hidden states frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Answer = tuple[NDArray[np.float32], NDArray[np.float32]]
"""What a network makes of a window: logits (C,) and hidden states (F, D)."""


def labels_equal(reference: Sequence[Answer], found: Sequence[Answer]) -> float:
    """Return the share of windows with the same label, 0 to 1."""
    pairs = zip(reference, found, strict=True)
    return float(np.mean([a[0].argmax() == b[0].argmax() for a, b in pairs]))


def frame_cosine(reference: Sequence[Answer], found: Sequence[Answer]) -> float:
    """Return the mean over all frames of all windows of the cosine of two hidden states."""
    cosines = []
    for (_, a), (_, b) in zip(reference, found, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append((a * b).sum(axis=1) / norms)
    return float(np.concatenate(cosines).mean())


def graph_answers(fp32: Path, file: Path, windows: Sequence[Samples]) -> list[Answer]:
    """Return what a graph makes of windows; the hidden states are those that the head reads.

    Args:
        fp32: The full-precision graph of `export.graph.export_graph`.
        file: What a quantizer made of it; the names inside must be kept.
        windows: Each of shape (T,).
    """
    import onnx

    from export.probe import tensor_values

    original, model = onnx.load(fp32), onnx.load(file)
    (projector,) = (node for node in original.graph.node if node.name == "projector")
    states = projector.input[0]
    factor, shift = _moved_by(original.graph, model.graph, states)
    del original  # of a large network it is more than a gigabyte
    values = tensor_values(model, ["logits", states], windows)
    return [(found["logits"][0], found[states][0] * factor + shift) for found in values]


def _moved_by(
    original: Any, quantized: Any, tensor: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return factor and shift that lead from a norm's output back to the original's, (D,) each.

    `export.smooth` divides its channels and `export.centre` shifts them, by constants of the norm.
    """
    from onnx import numpy_helper

    norms = []
    for graph in (original, quantized):
        constants = {one.name: one for one in graph.initializer}
        producer = next(node for node in graph.node if tensor in node.output)
        if producer.op_type != "LayerNormalization" or producer.input[1] not in constants:
            return np.ones(1, np.float32), np.zeros(1, np.float32)
        norms.append([numpy_helper.to_array(constants[name]) for name in producer.input[1:]])
    (scale, bias), (its_scale, its_bias) = norms
    factor = scale / its_scale
    return factor, bias - factor * its_bias


def torch_answers(network: Any, forward: Any, windows: Sequence[Samples]) -> list[Answer]:
    """Return what a network of `export.finetuned` makes of windows.

    Args:
        network: Its head is asked for what it reads.
        forward: What runs the network: itself, or its compiled form.
        windows: Each of shape (T,).
    """
    import torch

    states: list[Any] = []
    network.projector.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    answers = []
    with torch.inference_mode():
        for window in windows:
            logits, _ = forward(torch.from_numpy(window)[None])
            answers.append((logits[0].numpy(), states.pop()[0].numpy()))
    return answers
