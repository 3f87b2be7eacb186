"""INT8: one static calibration, explicit Q/DQ, and the graphs that share its weights.

The signed graph is the only form that TensorRT 10.3 and 11 both accept (symmetric, zero points 0,
weights per channel). Its activations rewritten to unsigned with zero point 128 stand for the same
numbers, and on x86 with VNNI ONNX Runtime multiplies those several times faster. Beside that, only
the sums of convolutions over time differ: that graph does not round them, see `export.frames`.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from tqdm import tqdm

from edge_ser.bundle import INT8_GRAPH, X86_GRAPH
from export.centre import centre
from export.clip import clip_ranges
from export.debias import correct_biases
from export.half import make_halves
from export.one_sided import shift_one_sided
from export.pairs import fit_pairs
from export.probe import Floats
from export.qdq import (
    QUANTIZED,
    drop_unused,
    float_nodes,
    give_unrounded,
    save_with_shared_weights,
    with_float_sums,
)
from export.recipe import Quantize
from export.rounding import ROUNDING_WINDOWS, round_weights
from export.sensitivity import (
    FRONT,
    apart,
    front,
    logits_of,
    order_to_give_back,
    walk,
)
from export.smooth import even_out
from export.turn import turn
from export.twice import x86_form

DEBIAS_WINDOWS = 48  # each level's turn runs all of them
WALK_WINDOWS = 24  # each layer's turn runs all of them

SOFTENED, SOFTEST_DB = 4, -36.0
"""One window of so many is calibrated with at a level of its own, down to this gain: else ranges
would end where the levels of the corpora do. For `default`, on speakers that its head had not
heard, divergence at -30 dB was 6.4e-4 nats with it and 7.2e-4 without: one fold, near chance."""


class WindowReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds windows, each of shape (T,), one by one: they differ in length."""

    def __init__(self, windows: Sequence[Floats]) -> None:
        self._left: Iterator[Floats] = iter(windows)

    def get_next(self) -> dict[str, Floats] | None:
        """Return the next window as the graph takes it, (1, T); None behind the last."""
        window = next(self._left, None)
        return None if window is None else {"samples": window[None]}


def quantize(
    fp32: onnx.ModelProto,
    windows: Sequence[Floats],
    settings: Quantize | None = None,
    given_back: Collection[str] = (),
) -> tuple[onnx.ModelProto, onnx.ModelProto, list[str]]:
    """Quantize every layer that `export.qdq.float_nodes` does not name.

    Args:
        fp32: The full-precision graph; left as it is.
        windows: Calibration speech, each of shape (T,).
        settings: The recipe's; what they say of the cost is not looked at.
        given_back: Layers that will not round what they read: factors and biases are made for that.

    Returns:
        Full precision, turned, centred, evened out and shifted, which changes nothing; the signed
        Q/DQ graph, its nodes and tensors called alike; and the names of the quantized layers.
    """
    settings = settings or Quantize()
    exact = onnx.ModelProto.FromString(fp32.SerializeToString())
    kept = float_nodes(exact.graph)
    layers = [n.name for n in exact.graph.node if n.op_type in QUANTIZED and n.name not in kept]
    # Stale shapes of the exporter contradict those that the quantizer infers.
    del exact.graph.value_info[:]
    windows = softened(windows)
    if settings.turning:
        turn(exact, layers, windows[0])
        drop_unused(exact.graph)  # ONNX Runtime would warn of each constant that was replaced
    if settings.centring:
        centre(exact, layers, windows)
        drop_unused(exact.graph)
    if settings.smoothing:
        even_out(exact, layers, windows, settings.smoothing, given_back)
        drop_unused(exact.graph)
    int8 = calibrate(exact, windows, list(kept))
    if settings.clipping:
        clip_ranges(exact, int8, windows[:ROUNDING_WINDOWS], layers)
    if settings.pairs:
        fit_pairs(exact, int8, layers)
    if settings.gptq:
        round_weights(
            exact, int8, windows[:ROUNDING_WINDOWS], layers,
            pairs=settings.pairs, about_means=settings.bias_correction,
        )  # fmt: skip
    if settings.centring:
        shift_one_sided(exact, int8, windows, layers, given_back)
    if settings.bias_correction:
        correct_biases(exact, int8, windows[:DEBIAS_WINDOWS], layers, list(given_back))
    return exact, int8, layers


def softened(windows: Sequence[Floats]) -> list[Floats]:
    """Return windows, one of `SOFTENED` softer by a gain between `SOFTEST_DB` and 0 dB."""
    gains_db = np.random.default_rng(0).uniform(SOFTEST_DB, 0, len(windows))
    return [
        window * np.float32(10 ** (gain_db / 20)) if number % SOFTENED == 0 else window
        for number, (window, gain_db) in enumerate(zip(windows, gains_db, strict=True))
    ]


def calibrate(
    model: onnx.ModelProto, windows: Sequence[Floats], kept: Sequence[str]
) -> onnx.ModelProto:
    """Return the signed Q/DQ graph of a graph, its ranges those of calibration speech.

    Args:
        model: Full precision.
        windows: Calibration speech, each of shape (T,).
        kept: Names of the nodes that stay float.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plain, signed = Path(scratch) / "plain.onnx", Path(scratch) / "signed.onnx"
        onnx.save(model, plain)
        # It advises to preprocess the graph; the exporter has.
        logging.disable(logging.WARNING)
        try:
            quantize_static(
                plain,
                signed,
                WindowReader(tqdm(windows, desc="calibration", unit="window")),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,  # TensorRT takes float biases only
                    "AddQDQPairToWeight": False,
                    # Rounding sums as well as factors costs accuracy and, for MatMul, no time less.
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
        finally:
            logging.disable(logging.NOTSET)
        int8 = onnx.load(signed)
    # What a layer reads is read by others too, the residual stream for one, and rounded for all of
    # them. Only sums of convolutions are to be rounded for whatever reads them.
    others = [n for n in int8.graph.node if n.op_type != "Conv" or n.name in set(kept)]
    give_unrounded(int8.graph, {name for node in others for name in node.output})
    return int8


def both_forms(
    int8: onnx.ModelProto, given_back: Collection[str] = ()
) -> dict[str, onnx.ModelProto]:
    """Return a signed Q/DQ graph as ARM and GPUs run it and as x86 does, by the files' names.

    Args:
        int8: The graph.
        given_back: Layers that multiply float values in the signed form, and values of two parts in
            that for x86.
    """
    return {
        INT8_GRAPH: with_float_sums(int8, given_back),
        X86_GRAPH: x86_form(int8, given_back),
    }


def write_int8(int8: onnx.ModelProto, folder: Path, given_back: Collection[str] = ()) -> None:
    """Write `both_forms` as a bundle has them, and the weights of both."""
    forms = both_forms(int8, given_back)
    save_with_shared_weights({folder / name: form for name, form in forms.items()})


@dataclass(frozen=True)
class Within:
    """INT8 that holds its bounds, as far as the recipe allows.

    Attributes:
        exact: Full precision, its tensors called as those of ``plain``.
        plain: The signed Q/DQ graph with no layer given back.
        int8: That with these: its factors and biases are made for them.
        given_back: Names of the layers that do not round what they read.
        alone: What the rounding of each layer costs alone, see `walk`.
        left: What is left of the cost, see `apart`: of the two forms, the worse.
    """

    exact: onnx.ModelProto
    plain: onnx.ModelProto
    int8: onnx.ModelProto
    given_back: list[str]
    alone: dict[str, float]
    left: dict[str, float]


def quantize_within(
    fp32: onnx.ModelProto,
    windows: Sequence[Floats],
    judged: Sequence[Floats],
    settings: Quantize,
) -> Within:
    """Quantize, and let as few layers as possible read what is not rounded.

    Args:
        fp32: The full-precision graph; left as it is.
        windows: Calibration speech, each of shape (T,).
        judged: Speech that was not calibrated with, each of shape (T,).
        settings: The recipe's.

    Returns:
        The graphs, with as few layers given back as hold the bounds, or as many as are allowed.
        That more of them answer no worse is taken as given.
    """
    expected = logits_of(fp32, judged)

    def left_of(int8: onnx.ModelProto, given_back: list[str]) -> dict[str, float]:
        forms = both_forms(int8, given_back).values()
        each = [apart(expected, logits_of(form, judged)) for form in forms]
        left = {
            "labels_equal": min(one["labels_equal"] for one in each),
            "divergence": max(one["divergence"] for one in each),
        }
        tqdm.write(
            f"quantize: with {len(given_back)} layers given back {left['labels_equal']:.1%} of the "
            f"judged windows keep their label, answers are {left['divergence']:.1e} nats apart"
        )
        return left

    def held(left: dict[str, float]) -> bool:
        equal = left["labels_equal"] >= settings.labels_equal
        return equal and left["divergence"] <= settings.divergence

    exact, plain, layers = quantize(fp32, windows, settings)
    alone = walk(exact, plain, layers, _some(judged))
    order = order_to_give_back(plain, alone)[: settings.most_float]
    found = Within(exact, plain, plain, [], alone, left_of(plain, []))
    if held(found.left) or not order:
        return found

    def with_first(count: int) -> Within:
        names = order[:count]
        _, int8, _ = quantize(fp32, windows, settings, names)
        return replace(found, int8=int8, given_back=names, left=left_of(int8, names))

    few, best = 0, with_first(len(order))
    # Each number of layers asks for a graph of its own: halving asks for few of them.
    while held(best.left) and len(best.given_back) - few > 1:
        tried = with_first((few + len(best.given_back)) // 2)
        if held(tried.left):
            best = tried
        else:
            few = len(tried.given_back)
    return best


def _some(windows: Sequence[Floats]) -> Sequence[Floats]:
    return windows[:: -(-len(windows) // WALK_WINDOWS)]


def make_int8(
    graph: Path,
    windows: Sequence[Floats],
    judged: Sequence[Floats],
    settings: Quantize,
    folder: Path,
) -> None:
    """The stage: INT8 graphs, full precision, both in half, and ``quantization.json``.

    Where the judged windows are answered too differently, some layers no longer round what they
    read, see `export.sensitivity.order_to_give_back`. A head that was trained again on all
    speakers has heard those of the validation, and its labels on them are safer than on others; so
    the divergence of the answers is looked at as well.

    Args:
        graph: The folder of ``model.onnx``.
        windows: Calibration speech, each of shape (T,).
        judged: Speech of the same kind that is not calibrated with.
        settings: The recipe's.
        folder: Takes the files.
    """
    model = onnx.load(graph / "model.onnx")
    made = quantize_within(model, windows, judged, settings)
    write_int8(made.int8, folder, made.given_back)
    some = _some(judged)
    order = order_to_give_back(made.plain, made.alone)
    forms = {n: x86_form(made.plain, order[:n]) for n in FRONT if n < len(order)}
    forms[len(made.given_back)] = x86_form(made.int8, made.given_back)
    reasons = {name: f"alone {made.alone[name]:.1e} nats; weights INT8" for name in made.given_back}
    found = {
        "float_nodes": {**float_nodes(model.graph), **reasons},
        "given_back": made.given_back,
        "validation": made.left,
        "alone": made.alone,
        "front": front([*sorted(forms.items()), (len(order), made.exact)], some),
    }
    shutil.copyfile(graph / "model.onnx", folder / "model.onnx")
    found["half_labels_equal"] = make_halves(folder, windows[:8], some)
    (folder / "quantization.json").write_text(json.dumps(found, indent=1))
