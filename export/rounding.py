"""Rounding of weights that looks at what they are multiplied by (GPTQ, arXiv 2210.17323).

Rounding each weight to the nearest step ignores that inputs of a layer go together. Here the rows
of a weight matrix are rounded one after the other, and the rows that follow take up the error of
each, as far as their inputs go along with its input. On Whisper-base this lowers the error that
INT8 weights make at the output of a layer 2 to 20 times.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from export.pairs import LARGEST_SUM
from export.probe import Floats, tensor_values

ROUNDING_WINDOWS = 128  # of calibration speech: whose moments are looked at
DAMPING = 0.01  # of the mean of the diagonal, the paper's; keeps the inverse stable
HELD_BYTES = (
    2 << 30
)  # a graph of 315 million parameters asks for 4e9, and is run once for each part
MULTIPLIED_AT_ONCE = 4  # windows: to add up a product of (D, D) takes longer than to multiply one
BLOCK = 128  # rows between two updates of all that follow: speed only


def round_weights(
    fp32: onnx.ModelProto,
    int8: onnx.ModelProto,
    windows: Sequence[Floats],
    layers: Sequence[str],
    *,
    pairs: bool = False,
    about_means: bool = False,
) -> None:
    """Round the weights of MatMul layers again, in place.

    Args:
        fp32: The full-precision graph; nodes and weights have the same names.
        int8: The Q/DQ graph.
        windows: Calibration speech, each of shape (T,).
        layers: Names of the quantized nodes.
        pairs: See `round_rows`.
        about_means: Whether biases will make up for what rounding does to the mean of an output, so
            that only what it does beside that counts.
    """
    exact = {tensor.name: tensor for tensor in fp32.graph.initializer}
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    scaled = {n.output[0]: n for n in int8.graph.node if n.op_type == "DequantizeLinear"}
    products = [n for n in fp32.graph.node if n.name in set(layers) and n.op_type == "MatMul"]
    inputs = {node.input[0]: exact[node.input[1]].dims[0] for node in products}
    rounded = {node.name: node for node in int8.graph.node}
    for names in held_at_once(inputs):
        moments = second_moments(fp32, names, windows, about_means=about_means)
        for node in products:
            if node.input[0] not in moments:
                continue
            weights, scale, _ = scaled[rounded[node.name].input[1]].input
            found = round_rows(
                numpy_helper.to_array(exact[node.input[1]]),
                numpy_helper.to_array(constants[scale]),
                *ordered(moments[node.input[0]]),
                pairs=pairs,
            )
            constants[weights].CopyFrom(numpy_helper.from_array(found, weights))


def held_at_once(inputs: Mapping[str, int]) -> list[list[str]]:
    """Return tensors in groups, in their order, whose moments fit into `HELD_BYTES` together.

    Args:
        inputs: Channels D by tensor; the moments of one are D * D numbers of 8 bytes.
    """
    groups: list[list[str]] = []
    left = 0
    for name, channels in inputs.items():
        size = 8 * channels**2
        if not groups or size > left:
            groups.append([])
            left = HELD_BYTES
        groups[-1].append(name)
        left -= size
    return groups


def second_moments(
    model: onnx.ModelProto,
    names: Sequence[str],
    windows: Sequence[Floats],
    *,
    about_means: bool = False,
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the sum over all frames of the outer product of a tensor's channels, (D, D) each.

    Args:
        model: The graph.
        names: Of its tensors, (1, F, D) each.
        windows: Speech, each of shape (T,).
        about_means: Whether each channel is taken less its mean over all frames.
    """
    products: dict[str, npt.NDArray[np.float64]] = {}
    middles: dict[str, Floats] = {}
    sums: dict[str, npt.NDArray[np.float64]] = {}
    count = dict.fromkeys(names, 0)
    heard = tensor_values(model, names, windows)
    while some := list(islice(heard, MULTIPLIED_AT_ONCE)):
        for name in names:
            frames = np.concatenate([v[name].reshape(-1, v[name].shape[-1]) for v in some])
            if name not in products:
                channels = frames.shape[1]
                products[name], sums[name] = np.zeros((channels, channels)), np.zeros(channels)
                middles[name] = frames.mean(axis=0) if about_means else np.zeros(1, np.float32)
            # Where values hardly vary, float32 would lose that in the squares of their means.
            frames = frames - middles[name]
            products[name] += frames.T @ frames
            sums[name] += frames.sum(axis=0, dtype=np.float64)
            count[name] += len(frames)
    if about_means:
        for name, total in sums.items():
            products[name] -= np.outer(total, total) / count[name]
    return products


def upper_factor(moments: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the upper Cholesky factor of the inverse of a positive definite matrix, (D, D).

    It holds, row by row, how the rows below should answer. Where J turns the order round and
    J M J = L L', it is the inverse of J L J: two thirds of n^3 operations, inverting M takes three
    and a half times as many.
    """
    lower = cholesky(moments[::-1, ::-1], lower=True)
    inverse, _ = dtrtri(np.asfortranarray(lower[::-1, ::-1]), lower=0)
    return np.asarray(inverse)


def ordered(
    moments: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the order of the rows, (D,), and the `upper_factor` of their moments in it, (D, D)."""
    damped = moments + np.eye(len(moments)) * max(DAMPING * np.diag(moments).mean(), 1e-12)
    # The loudest inputs first, while all others can still help.
    order = np.argsort(-np.diag(damped))
    return order, upper_factor(damped[np.ix_(order, order)])


def left_of_rows(moments: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how much of the squared rounding error of a row is left at the output, (D,).

    The rows that are rounded behind it have taken up the rest.

    Args:
        moments: Sum of outer products of inputs, ``(D, D)``.
    """
    order, factor = ordered(moments)
    left = np.empty(len(moments))
    left[order] = 1 / np.square(np.diag(factor))
    return left


def round_rows(
    weights: Floats,
    scale: Floats,
    order: npt.NDArray[np.int64],
    factor: npt.NDArray[np.float64],
    *,
    pairs: bool = False,
) -> npt.NDArray[np.int8]:
    """Round a weight matrix so that its product with such inputs changes little.

    Args:
        weights: ``(D, O)``.
        scale: Size of a step, of each column ``(O,)`` or of all ``()``.
        order: As `ordered` returns it.
        factor: The same.
        pairs: Whether no pair of rows may overflow 16 bits, see `export.pairs`.

    Returns:
        Whole steps from -127 to 127, ``(D, O)``.
    """
    left = weights[order].astype(np.float64)
    steps = np.zeros(left.shape, np.int8)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for row in range(start, stop):
            least, most = -127, 127
            partner = order[row] ^ 1
            if pairs and partner < len(left):  # its row is 0 as long as it is not rounded
                beside = steps[partner].astype(int)
                least = np.maximum(least, -LARGEST_SUM - beside.clip(max=0))
                most = np.minimum(most, LARGEST_SUM - beside.clip(min=0))
            whole = np.clip(np.round(left[row] / scale), least, most)
            steps[order[row]] = whole
            errors[row - start] = (left[row] - whole * scale) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], errors[row - start])
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return steps
