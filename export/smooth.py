"""SmoothQuant (arXiv 2211.10438) on a graph: loud channels are evened out before they are rounded.

One scale serves a whole activation tensor, so a few loud channels leave the others with a few
levels out of 256. Dividing each input channel of a layer by a factor, and multiplying the layer's
weights for that channel by it, changes nothing in full precision. Behind a LayerNormalization or
attention, the division goes into constants and costs nothing; elsewhere it is a Mul, which must be
worth its time.

What is taken from the activations makes weights harder to round. A layer that is given back no
longer rounds what it reads, so its factors are those that its weights are rounded best with.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from scipy.optimize import minimize

from export.probe import Floats, tensor_values
from export.rounding import ROUNDING_WINDOWS, held_at_once, left_of_rows, second_moments
from export.upstream import give, scaling

Vector = npt.NDArray[np.float64]

# Of the squared error that rounding makes, the most that an extra multiplication may leave.
WORTH = 0.5

POWERS = (16, 128)
"""Of the norms that stand for the largest weight of a column while factors are searched: that has
no gradient where two are as large. What is found is within 0.3 % of what steps along subgradients
find in Whisper-base."""


def even_out(
    model: onnx.ModelProto,
    layers: Sequence[str],
    windows: Sequence[Floats],
    strength: float,
    given_back: Collection[str] = (),
) -> None:
    """Even out the channels that layers read, in place.

    Args:
        model: Its Conv, Gemm and MatMul weights are constants.
        layers: Names of the nodes that will be quantized.
        windows: Calibration speech, each of shape (T,).
        strength: How much goes to the weights, 0 to 1: the paper's alpha. Above its 0.5, because
            `rounding` makes weights cheaper to round than activations.
        given_back: Those of them that will not round what they read. Where all that read a tensor
            are such MatMul, only their weights count.
    """
    nodes = [node for node in model.graph.node if node.name in set(layers)]
    loudest = channel_maxima(model, nodes, windows)
    readers = {name: [node for node in nodes if node.input[0] == name] for name in loudest}
    exact = {
        name: len(loudest[name])
        for name, those in readers.items()
        if all(node.op_type == "MatMul" and node.name in given_back for node in those)
    }
    left = {
        name: left_of_rows(moments)
        for names in held_at_once(exact)
        for name, moments in second_moments(
            model, names, windows[:ROUNDING_WINDOWS], about_means=True
        ).items()
    }
    for name, those in readers.items():
        _even_tensor(model.graph, name, those, loudest[name], strength, left.get(name))


def channel_maxima(
    model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], windows: Sequence[Floats]
) -> dict[str, Floats]:
    """Return the largest magnitude of every channel of what the layers read, by tensor."""
    axis_of = {node.input[0]: 1 if node.op_type == "Conv" else -1 for node in layers}
    found: dict[str, Floats] = {}
    for values in tensor_values(model, list(axis_of), windows):
        for name, value in values.items():
            others = tuple(a for a in range(value.ndim) if a != axis_of[name] % value.ndim)
            found[name] = np.maximum(found.get(name, 0), np.abs(value).max(axis=others))
    return found


def _even_tensor(
    graph: onnx.GraphProto,
    tensor: str,
    layers: Sequence[onnx.NodeProto],
    loudest: Floats,
    strength: float,
    left: Vector | None,
) -> None:
    constants = {constant.name: constant for constant in graph.initializer}
    weights = [
        exchange_channels(node, numpy_helper.to_array(constants[node.input[1]])) for node in layers
    ]  # (in, ...)
    if left is None:
        factor, error = _factors(loudest, weights, strength)
    else:
        factor, error = factors_of_weights(np.concatenate(weights, axis=1), left)
    producer = next(node for node in graph.node if tensor in node.output)
    readers = [node for node in graph.node if tensor in node.input]
    free = scaling(graph, tensor) if len(readers) == len(layers) else []
    if error > (1 if free else WORTH):
        return
    for node, weight in zip(layers, weights, strict=True):
        scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        array = np.ascontiguousarray(exchange_channels(node, scaled))
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(array, node.input[1]))
    if free:
        for number, (node, place) in enumerate(free):
            array = numpy_helper.to_array(constants[node.input[place]]) / factor
            give(graph, node, place, f"{tensor}_even_{number}", array)
        return
    shape = (-1, 1) if layers[0].op_type == "Conv" else (-1,)
    name, even = f"{tensor}_inverse", f"{tensor}_even"
    graph.initializer.append(numpy_helper.from_array((1 / factor).reshape(shape), name))
    divide = helper.make_node("Mul", [tensor, name], [even], even)
    graph.node.insert(list(graph.node).index(producer) + 1, divide)
    for node in layers:
        node.input[0] = even


def _factors(loudest: Floats, weights: Sequence[Floats], strength: float) -> tuple[Floats, float]:
    """Return what channels are divided by, (D,), and `error_left` of it."""
    # A channel that calibration speech hardly excites may be loud in other speech.
    loudest = np.maximum(loudest, np.median(loudest))
    heaviest = np.max([np.abs(w).reshape(len(w), -1).max(axis=1) for w in weights], axis=0)
    factor = np.maximum(loudest, 1e-5) ** strength / np.maximum(heaviest, 1e-5) ** (1 - strength)
    factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
    squares = sum(np.square(weight).reshape(len(weight), -1).sum(axis=1) for weight in weights)
    return factor, error_left(loudest, squares, factor)


def factors_of_weights(weights: Floats, left: Vector) -> tuple[Floats, float]:
    """Return the factors with which weights are rounded best, whatever it takes of the values.

    The largest weight of a column decides its step. Of the squared error of a step, what is left
    of a row at the output goes down with the square of its factor. So the error is the sum of the
    squared steps of all columns, times the sum of what is left of all rows: convex in the
    logarithms of the factors.

    Args:
        weights: ``(D, O)``.
        left: What `export.rounding.left_of_rows` returned, (D,).

    Returns:
        What is multiplied with the weights of each row, float32, (D,), its mean logarithm 0; and
        the error with it, as a share of that without.
    """
    magnitudes = np.maximum(np.abs(weights), 1e-5).astype(np.float64)

    def error(log: Vector, power: int) -> tuple[float, Vector]:
        """The logarithm of the error, and its gradient."""
        parts = magnitudes * np.exp(log)[:, None]
        largest = parts.max(axis=0)
        parts /= largest
        for _ in range(power.bit_length() - 1):
            parts *= parts  # raised to the power, far faster than by pow
        sums = parts.sum(axis=0)
        columns = np.square(largest * sums ** (1 / power))
        rows = left * np.exp(-2 * log)
        gradient = parts @ (columns / sums) / columns.sum() - rows / rows.sum()
        return float(np.log(columns.sum()) + np.log(rows.sum())), 2 * gradient

    log = -np.log(magnitudes.max(axis=1))  # the largest weights of all rows are alike
    for power in POWERS:  # of two
        log = minimize(error, log, power, jac=True, method="L-BFGS-B").x
    factor = np.exp(log - log.mean())

    def exact(factor: Vector) -> float:
        columns = np.square((magnitudes * factor[:, None]).max(axis=0))
        return float(columns.sum() * (left / np.square(factor)).sum())

    return factor.astype(np.float32), exact(factor) / exact(np.ones(len(left)))


def error_left(loudest: Floats, squares: Floats, factor: Floats) -> float:
    """Return what factors leave of the squared error that the rounding of activations makes.

    Every channel is off by the same step, which the loudest one decides; a layer's output takes
    that up as much as the squares of the channel's weights say.

    Args:
        loudest: Largest magnitude of every channel, (D,).
        squares: Sum of the squared weights that read it, (D,).
        factor: What it is divided by, and its weights are multiplied by, (D,).

    Returns:
        Above 1 where the error grows.
    """
    before = loudest.max() ** 2 * squares.sum()
    after = (loudest / factor).max() ** 2 * (squares * factor**2).sum()
    return float(after / before) if before else 1.0


def exchange_channels(node: onnx.NodeProto, weights: Floats) -> Floats:
    """Exchange the axes of input and output channels; twice, the weights are as they were.

    The first axis of the result is that of the input channels. In a grouped convolution those of a
    group follow those of the group before.
    """
    groups = _groups(node)
    if not groups:
        return weights
    parts = weights.reshape(groups, -1, *weights.shape[1:]).swapaxes(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


def _groups(node: onnx.NodeProto) -> int:
    """Return the groups of a layer whose weights have the output channels first; else 0."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        return attributes.get("group", 1)
    return attributes.get("transB", 0)
