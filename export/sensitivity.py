"""What rounding costs layer by layer, and what it would cost to leave some layers float."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from scipy.special import softmax
from tqdm import tqdm

from export import metrics
from export.probe import Floats, session_of
from export.qdq import as_float, unsigned

FRONT = (0, 1, 2, 4, 8)
"""Float layers of the graphs that are compared."""

Logits = npt.NDArray[np.float32]


def walk(
    exact: onnx.ModelProto,
    int8: onnx.ModelProto,
    layers: Sequence[str],
    windows: Sequence[Floats],
) -> dict[str, float]:
    """Return how far the rounding of each layer alone moves the answers, the worst layer first.

    Args:
        exact: Full precision.
        int8: Its signed Q/DQ graph.
        layers: Names of the quantized nodes.
        windows: Speech, each of shape (T,).

    Returns:
        The `divergence` from full precision by layer, in nats.
    """
    expected = logits_of(exact, windows)
    found = {}
    for layer in tqdm(layers, desc="sensitivity", unit="layer"):
        alone = as_float(int8, exact, set(layers) - {layer})
        found[layer] = divergence(expected, logits_of(unsigned(alone), windows))
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def order_to_give_back(int8: onnx.ModelProto, alone: Mapping[str, float]) -> list[str]:
    """Return layers in the order in which they should no longer round what they read.

    First come those that cost more than the mean layer, the one with the fewest weights for its
    cost before all: what a layer takes grows with its weights. Then come the others.

    Args:
        int8: The Q/DQ graph.
        alone: What `walk` returned.
    """
    sources = {output: node for node in int8.graph.node for output in node.output}
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in int8.graph.initializer}
    weights = {
        node.name: sizes[sources[node.input[1]].input[0]]
        for node in int8.graph.node
        if node.name in alone
    }
    mean = statistics.mean(alone.values())
    dear = [name for name, cost in alone.items() if cost > mean]
    dear.sort(key=lambda name: weights[name] / alone[name])
    return [*dear, *(name for name in alone if name not in dear)]


def apart(expected: Logits, found: Logits) -> dict[str, float]:
    """Return the share of ``labels_equal`` and the ``divergence`` of answers, in nats.

    Args:
        expected: Logits (N, C).
        found: The same of another graph.
    """
    same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return {"labels_equal": same, "divergence": divergence(expected, found)}


def front(
    graphs: Sequence[tuple[int, onnx.ModelProto]], windows: Sequence[Floats]
) -> list[dict[str, Any]]:
    """Compare graphs with ever more layers given back.

    Args:
        graphs: How many layers are given back, and the graph as x86 runs it; the last one is full
            precision.
        windows: Speech, each of shape (T,).

    Returns:
        For each how many ``float_layers``, ``mb`` of weights, the ``divergence`` in nats, and the
        ``time``: the median over windows, heard by all graphs in turns, of the share of what full
        precision takes.
    """
    sessions = [session_of(model) for _, model in graphs]
    answers: list[list[Logits]] = [[] for _ in sessions]
    taken: list[list[float]] = [[] for _ in sessions]
    for window in windows:
        for place, session in enumerate(sessions):
            start = time.perf_counter()
            answers[place].append(session.run(["logits"], {"samples": window[None]})[0])
            taken[place].append(time.perf_counter() - start)
    expected = np.concatenate(answers[-1])
    return [
        {
            "float_layers": count,
            "mb": model.ByteSize() / 1e6,
            "divergence": divergence(expected, np.concatenate(found)),
            "time": statistics.median(a / b for a, b in zip(seconds, taken[-1], strict=True)),
        }
        for (count, model), found, seconds in zip(graphs, answers, taken, strict=True)
    ]


def divergence(expected: Logits, found: Logits) -> float:
    """Return the mean Kullback-Leibler divergence of answers from expected ones, in nats.

    Args:
        expected: Logits (N, C).
        found: The same of another graph.
    """
    exact, probs = (softmax(logits.astype(np.float64), axis=1) for logits in (expected, found))
    return metrics.divergence(exact, probs)


def logits_of(model: onnx.ModelProto, windows: Sequence[Floats]) -> Logits:
    """Return the logits (N, C) of N windows, each of shape (T,)."""
    session = session_of(model)
    return np.concatenate([session.run(["logits"], {"samples": w[None]})[0] for w in windows])
