"""INT8: one static calibration, explicit Q/DQ, and the two graphs that share its weights.

The signed graph is the only form that TensorRT 10.3 and 11 both accept (symmetric, zero points 0,
weights per channel). Its activations rewritten to unsigned with zero point 128 stand for the same
numbers, and on x86 with VNNI ONNX Runtime multiplies those several times faster.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from tqdm import tqdm

from export.centre import centre
from export.debias import bias_and_output, correct_biases
from export.half import make_halves
from export.probe import labels_equal, tensor_values
from export.rounding import round_weights
from export.smooth import even_out

QUANTIZED = ("Conv", "Gemm", "MatMul")
WEIGHTS = "model_int8.bin"

ENOUGH_EQUAL = 0.98  # what the gate asks for; a float layer costs size and time
MOST_GIVEN_BACK = 4
ROUNDING_WINDOWS = 48
DEBIAS_WINDOWS = 24  # each layer's turn runs all of them

Samples = npt.NDArray[np.float32]


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    """Feeds windows one by one: they differ in length."""

    def __init__(self, windows: Sequence[Samples]) -> None:
        self._left: Iterator[Samples] = iter(windows)

    def get_next(self) -> dict[str, Samples] | None:
        window = next(self._left, None)
        return None if window is None else {"samples": window[None]}


def float_nodes(graph: onnx.GraphProto) -> list[str]:
    """Return the Conv, Gemm and MatMul nodes that stay float.

    The log-mel front end spans more decades than 8 bits hold, and so do raw samples. A convolution
    with a single input channel hears these, or a channel each, which INT8 does not make faster.
    Products of two activations are the attention, whose probabilities shrink with the length of the
    window. The last layers give the logits, and cost nothing.
    """
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    front_end = {name for name in constants if ".mel." in name}
    producers = {output: node for node in graph.node for output in node.output}
    kept = [
        node.name
        for node in graph.node
        if node.op_type in QUANTIZED
        and (
            front_end & set(node.input)
            or node.input[1] not in constants
            or (node.op_type == "Conv" and constants[node.input[1]][1] == 1)
        )
    ]
    return [*kept, *(node.name for node in _last_layers(producers, "logits"))]


def _last_layers(producers: Mapping[str, onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Return the layers whose sum is an output."""
    node = producers[output]
    if node.op_type in QUANTIZED:
        return [node]
    return [
        layer for name in node.input if name in producers for layer in _last_layers(producers, name)
    ]


def quantize(
    fp32: Path, windows: Sequence[Samples], folder: Path, given_back: Sequence[str] = ()
) -> list[str]:
    """Write ``model_int8.onnx``, ``model_int8_x86.onnx`` and the weights of both.

    Args:
        fp32: The full-precision graph.
        windows: Calibration speech, each of shape (T,).
        folder: Takes the three files.
        given_back: Names of layers that stay float besides those of `float_nodes`.

    Returns:
        Names of the nodes that stayed float.
    """
    model = onnx.load(fp32)
    kept = [*float_nodes(model.graph), *given_back]
    layers = [n.name for n in model.graph.node if n.op_type in QUANTIZED and n.name not in kept]
    # Stale shapes of the exporter contradict those that the quantizer infers.
    del model.graph.value_info[:]
    for change in (even_out, centre):
        change(model, layers, windows)
        _drop_unused(model.graph)  # ONNX Runtime would warn of each constant that was replaced
    with tempfile.TemporaryDirectory() as scratch:
        plain, signed = Path(scratch) / "plain.onnx", Path(scratch) / "signed.onnx"
        onnx.save(model, plain)
        # It advises to preprocess the graph; the exporter has.
        logging.disable(logging.WARNING)
        try:
            quantize_static(
                plain,
                signed,
                _Windows(windows),
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
    round_weights(model, int8, windows[:ROUNDING_WINDOWS], layers)
    correct_biases(model, int8, windows[:DEBIAS_WINDOWS], layers)
    save_with_shared_weights(
        {folder / "model_int8.onnx": int8, folder / "model_int8_x86.onnx": unsigned(int8)}
    )
    return kept


def layer_errors(fp32: Path, int8: Path, windows: Sequence[Samples]) -> dict[str, float]:
    """Return how far the output of each quantized layer is from full precision, worst first.

    The error of a layer holds those of the layers before it. It is the root mean square of the
    difference over that of the full-precision output.
    """
    models = [onnx.load(file) for file in (fp32, int8)]
    quantized = models[1].graph
    scaled = {node.output[0] for node in quantized.node if node.op_type == "DequantizeLinear"}
    constants = {tensor.name: tensor for tensor in quantized.initializer}
    there = {output for node in models[0].graph.node for output in node.output}
    layers = {}
    for node in quantized.node:
        if node.op_type in QUANTIZED and node.input[0] in scaled and node.input[1] in scaled:
            # Behind the bias: before it, a centred layer differs by what the bias makes up for.
            output = bias_and_output(quantized, node, constants)[1]
            if output in there:
                layers[output] = node.name
    squares = np.zeros((len(layers), 2))
    pairs = zip(*(tensor_values(m, list(layers), windows) for m in models), strict=True)
    for exact, rounded in pairs:
        for row, output in enumerate(layers):
            difference = exact[output] - rounded[output]
            squares[row] += np.square(difference).sum(), np.square(exact[output]).sum()
    errors = np.sqrt(squares[:, 0] / squares[:, 1])
    return {
        name: float(error)
        for error, name in sorted(zip(errors, layers.values(), strict=True), reverse=True)
    }


def unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose quantized activations are uint8 with zero point 128.

    Every integer moves up by 128 and so does the zero point, so each stands for the same number.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    weights = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims}
    zero = "zero_point_128"
    graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), zero))
    for node in graph.node:
        if node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] not in weights
        ):
            node.input[2] = zero
    _drop_unused(graph)
    return model


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def save_with_shared_weights(models: Mapping[Path, onnx.ModelProto], least: int = 1024) -> None:
    """Write graphs whose large tensors lie once, for all of them, in `WEIGHTS` beside them.

    Args:
        models: Graph by file; all files in one folder. Tensors of one name must be equal.
        least: Smaller tensors stay inside, in bytes.
    """
    places: dict[str, tuple[int, bytes]] = {}
    folder = next(iter(models)).parent
    with (folder / WEIGHTS).open("wb") as stream:
        for file, model in models.items():
            for tensor in model.graph.initializer:
                raw = numpy_helper.to_array(tensor).tobytes()
                if len(raw) < least:
                    continue
                if tensor.name not in places:
                    places[tensor.name] = (stream.tell(), raw)
                    stream.write(raw)
                offset, stored = places[tensor.name]
                if stored != raw:
                    raise ValueError(f"two graphs hold different values of {tensor.name}")
                kind, dims, name = tensor.data_type, list(tensor.dims), tensor.name
                tensor.Clear()
                tensor.name, tensor.data_type = name, kind
                tensor.dims.extend(dims)
                tensor.data_location = TensorProto.EXTERNAL
                entries = {"location": WEIGHTS, "offset": offset, "length": len(raw)}
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=str(value))
            file.write_bytes(model.SerializeToString())
    for file in models:
        onnx.checker.check_model(str(file))  # by path: only so does it find the weights


def make_int8(
    graph: Path, windows: Sequence[Samples], judged: Sequence[Samples], folder: Path
) -> None:
    """The stage: INT8 graphs, full precision, both in half, and ``quantization.json``.

    As long as too few of the judged windows keep their label, the layer with the largest error is
    given back to float. A head that was trained again on all speakers has heard those of the
    validation, and its labels on them are safer than on others; what others get, `certify` tells.

    Args:
        graph: The folder of ``model.onnx``.
        windows: Calibration speech, each of shape (T,).
        judged: Speech of the same kind that is not calibrated with.
        folder: Takes the files.
    """
    fp32, int8 = graph / "model.onnx", folder / "model_int8_x86.onnx"
    given_back: list[str] = []
    while True:
        kept = quantize(fp32, windows, folder, given_back)
        equal = labels_equal(fp32, int8, judged)
        errors = layer_errors(fp32, int8, windows[:8])
        tqdm.write(f"quantize: {equal:.1%} of the judged windows keep their label")
        if equal >= ENOUGH_EQUAL or len(given_back) == MOST_GIVEN_BACK:
            break
        given_back.append(next(iter(errors)))
        tqdm.write(f"quantize: layer {given_back[-1]} goes back to float")
    found = {
        "float_nodes": kept,
        "given_back": given_back,
        "validation_labels_equal": equal,
        "layer_error": errors,
    }
    shutil.copyfile(fp32, folder / fp32.name)
    found["half_labels_equal"] = make_halves(folder, windows[:8], judged)
    (folder / "quantization.json").write_text(json.dumps(found, indent=1))
