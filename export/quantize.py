"""INT8: one static calibration, explicit Q/DQ, and the graphs that share its weights.

The signed graph is the only form that TensorRT 10.3 and 11 both accept (symmetric, zero points 0,
weights per channel). Its activations rewritten to unsigned with zero point 128 stand for the same
numbers, and on x86 with VNNI ONNX Runtime multiplies those several times faster.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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

from export.centre import centre
from export.clip import clip_ranges
from export.debias import correct_biases
from export.half import make_halves
from export.pairs import fit_pairs
from export.probe import Floats
from export.qdq import (
    QUANTIZED,
    drop_unused,
    float_nodes,
    save_with_shared_weights,
    with_float_sums,
)
from export.recipe import Quantize
from export.rounding import round_weights
from export.sensitivity import (
    apart,
    front,
    logits_of,
    order_to_give_back,
    walk,
)
from export.smooth import even_out
from export.turn import turn
from export.twice import x86_form

ROUNDING_WINDOWS = 128
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
    fp32: onnx.ModelProto, windows: Sequence[Floats], settings: Quantize | None = None
) -> tuple[onnx.ModelProto, onnx.ModelProto, list[str]]:
    """Quantize every layer that `export.qdq.float_nodes` does not name.

    Args:
        fp32: The full-precision graph; left as it is.
        windows: Calibration speech, each of shape (T,).
        settings: The recipe's; what they say of the cost is not looked at.

    Returns:
        Full precision, turned, centred and evened out, which changes nothing; the signed Q/DQ
        graph, its nodes and tensors called alike; and the names of the quantized layers.
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
        even_out(exact, layers, windows, settings.smoothing)
        drop_unused(exact.graph)
    int8 = calibrate(exact, windows, list(kept))
    if settings.clipping:
        clip_ranges(exact, int8, windows[:ROUNDING_WINDOWS], layers)
    if settings.pairs:
        fit_pairs(exact, int8, layers)
    if settings.gptq:
        heard = windows[:ROUNDING_WINDOWS]
        round_weights(exact, int8, heard, layers, pairs=settings.pairs)
    if settings.bias_correction:
        correct_biases(exact, int8, windows[:DEBIAS_WINDOWS], layers)
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
        return onnx.load(signed)


def write_int8(int8: onnx.ModelProto, folder: Path, given_back: Sequence[str] = ()) -> None:
    """Write a signed Q/DQ graph as a bundle has it: in both forms, and the weights of both.

    Args:
        int8: The graph.
        folder: Takes the files.
        given_back: Layers that multiply float values in the signed form, and values of two parts in
            that for x86.
    """
    save_with_shared_weights(
        {
            folder / "model_int8.onnx": with_float_sums(int8, given_back),
            folder / "model_int8_x86.onnx": x86_form(int8, given_back),
        }
    )


def give_back(
    exact: onnx.ModelProto,
    int8: onnx.ModelProto,
    layers: Sequence[str],
    windows: Sequence[Floats],
    judged: Sequence[Floats],
    settings: Quantize,
) -> tuple[onnx.ModelProto, list[str], dict[str, float], dict[str, float]]:
    """Let layers read what is not rounded until judged windows are answered alike.

    Args:
        exact: Full precision.
        int8: Its signed Q/DQ graph.
        layers: Names of the quantized nodes.
        windows: Calibration speech, each of shape (T,).
        judged: Speech that was not calibrated with, each of shape (T,).
        settings: The recipe's.

    Returns:
        The signed Q/DQ graph, its biases those for these layers; their names, as few as hold the
        bounds, or as many as the recipe allows; what the rounding of each layer costs alone, see
        `walk`; and what is left of the cost, see `apart`.
    """
    alone = walk(exact, int8, layers, _some(judged))
    expected = logits_of(exact, judged)
    heard = softened(windows)[:DEBIAS_WINDOWS]
    given_back: list[str] = []
    chosen = onnx.ModelProto.FromString(int8.SerializeToString())
    for layer in [*order_to_give_back(int8, alone)[: settings.most_float], None]:
        left = apart(expected, logits_of(x86_form(chosen, given_back), judged))
        tqdm.write(
            f"quantize: with {len(given_back)} layers given back {left['labels_equal']:.1%} of the "
            f"judged windows keep their label, answers are {left['divergence']:.1e} nats apart"
        )
        held = left["labels_equal"] >= settings.labels_equal
        if layer is None or (held and left["divergence"] <= settings.divergence):
            break
        given_back.append(layer)
        if settings.bias_correction:
            correct_biases(exact, chosen, heard, [layer], given_back)
    return chosen, given_back, alone, left


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

    As long as the judged windows are answered too differently, one layer more no longer rounds what
    it reads, see `export.sensitivity.order_to_give_back`. A head that was trained again on all
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
    exact, int8, layers = quantize(model, windows, settings)
    chosen, given_back, alone, left = give_back(exact, int8, layers, windows, judged, settings)
    write_int8(chosen, folder, given_back)
    some = _some(judged)
    reasons = {name: f"alone {alone[name]:.1e} nats; weights INT8" for name in given_back}
    found = {
        "float_nodes": {**float_nodes(model.graph), **reasons},
        "given_back": given_back,
        "validation": left,
        "alone": alone,
        "front": front(exact, int8, order_to_give_back(int8, alone), some, len(given_back)),
    }
    shutil.copyfile(graph / "model.onnx", folder / "model.onnx")
    found["half_labels_equal"] = make_halves(folder, windows[:8], some)
    (folder / "quantization.json").write_text(json.dumps(found, indent=1))
