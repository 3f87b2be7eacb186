"""What makes an INT8 graph of a full-precision one: other tools at their best settings, and ours.

All read the same graph, whose weights are constants and whose attention is written out, and are
calibrated with the same windows. That is kind to them: on a graph as their own exporters write it,
some refuse the convolution with weight normalization.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from benchmarks.subjects import Samples
from edge_ser.errors import MissingDependency
from export.qdq import QUANTIZED, float_nodes, unsigned
from export.quantize import WindowReader, quantize, write_int8
from export.recipe import Quantize

Make = Callable[[Path, Sequence[Samples], Path], None]
MODEL = "model.onnx"


@dataclass(frozen=True)
class Quantizer:
    """A tool with its settings.

    Attributes:
        name: Of the folder of its files.
        make: Writes them, given the full-precision graph, calibration windows of shape (T,) and
            one length, and the folder.
        rows: File and settings of each row of the table, by the row's name.
    """

    name: str
    make: Make
    rows: Mapping[str, tuple[str, str]]


def _plain(fp32: Path, folder: Path) -> Path:
    """Copy the graph without the shapes that its exporter noted: quantizers stumble over them."""
    model = onnx.load(fp32)
    del model.graph.value_info[:]
    file = folder / "plain.onnx"
    onnx.save(model, file)
    return file


def _attention_products(fp32: Path) -> list[str]:
    """Return the products of two activations, whose rounding loses long windows."""
    graph = onnx.load(fp32).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if node.input[1] not in constants]


def _missing(exc: ImportError) -> MissingDependency:
    line = str(exc).partition("\n")[0]
    return MissingDependency(f'{line}; run: pip install -e ".[peers]"')


def make_dynamic(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """ONNX Runtime, ranges of activations found while it runs; windows are not needed."""
    plain = _plain(fp32, folder)
    quantize_dynamic(
        plain,
        folder / MODEL,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    plain.unlink()


def make_static(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """ONNX Runtime, all that it can quantize."""
    plain = _plain(fp32, folder)
    quantize_static(
        plain,
        folder / MODEL,
        WindowReader(windows),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    plain.unlink()


def make_optimum_dynamic(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """``ORTQuantizer`` of optimum; windows are not needed."""
    _optimum(fp32, None, folder, ["MatMul", "Gemm"], _attention_products(fp32))


def make_optimum_static(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """``ORTQuantizer`` of optimum, its ranges of activations calibrated."""
    kept = list(float_nodes(onnx.load(fp32).graph))
    _optimum(fp32, windows, folder, list(QUANTIZED), kept)


def _optimum(
    fp32: Path,
    windows: Sequence[Samples] | None,
    folder: Path,
    operators: list[str],
    kept: list[str],
) -> None:
    try:
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig
    except ImportError as exc:
        raise _missing(exc) from exc
    plain = _plain(fp32, folder)
    config = AutoQuantizationConfig.avx512_vnni(
        is_static=windows is not None, operators_to_quantize=operators, nodes_to_exclude=kept
    )
    quantizer, ranges = ORTQuantizer(plain), None
    if windows is not None:
        # Any iterable serves as its dataset, so the package of that name is not needed.
        ranges = quantizer.fit(
            [{"samples": window} for window in windows],
            CalibrationConfig("windows", "", "", len(windows), CalibrationMethod.MinMax),
            onnx_augmented_model_name=folder / "augmented.onnx",
            operators_to_quantize=operators,
        )
        (folder / "augmented.onnx").unlink()
    quantizer.quantize(config, folder, "int8", ranges)
    (folder / "plain_int8.onnx").rename(folder / MODEL)
    plain.unlink()


def make_modelopt_default(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """NVIDIA's modelopt as it comes, but for float parts that would be half precision."""
    _modelopt(fp32, windows, folder)


def make_modelopt_best(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """NVIDIA's modelopt without attention, and the same numbers with unsigned activations."""
    best = {"op_types_to_quantize": ["MatMul", "Conv"], "disable_mha_qdq": True}
    _modelopt(fp32, windows, folder, calibration_method="max", dq_only=True, **best)
    onnx.save(unsigned(onnx.load(folder / MODEL)), folder / "model_u8.onnx")


def _modelopt(fp32: Path, windows: Sequence[Samples], folder: Path, **settings: object) -> None:
    try:
        from modelopt.onnx.quantization import quantize as modelopt_quantize
    except ImportError as exc:
        raise _missing(exc) from exc
    plain = _plain(fp32, folder)
    model = onnx.load(plain)
    # It takes names for patterns, and an attention's name is the beginning of its projections'.
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number:05}"
    onnx.save(model, plain)
    modelopt_quantize(
        str(plain),
        calibration_data={"samples": np.stack(windows)},
        calibration_shapes=f"samples:1x{len(windows[0])}",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(folder / MODEL),
        log_level="ERROR",
        **settings,
    )
    for left in folder.glob("plain*"):
        left.unlink()


def make_ours(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """`export.quantize`."""
    write_int8(quantize(onnx.load(fp32), windows)[1], folder)


def make_ours_of_random(fp32: Path, windows: Sequence[Samples], folder: Path) -> None:
    """`export.quantize` without what takes long and changes numbers, but no node of the graph."""
    settings = Quantize(gptq=False, bias_correction=False)
    write_int8(quantize(onnx.load(fp32), windows, settings)[1], folder)


def run_quantizer(
    quantizer: Quantizer, fp32: Path, windows: Sequence[Samples], folder: Path
) -> None:
    """Write the files of a quantizer. Runs in a process of its own: some need much memory.

    Raises:
        MissingDependency: Its package is not installed.
    """
    logging.disable(logging.CRITICAL)  # they advise what has been done, and miss a GPU
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        quantizer.make(fp32, windows, folder)


QUANTIZERS = (
    Quantizer(
        "optimum_dynamic",
        make_optimum_dynamic,
        {
            "optimum dynamic": (
                MODEL,
                "ORTQuantizer, avx512_vnni: weights S8 per channel, activations U8; MatMul and "
                "Gemm but the attention products",
            )
        },
    ),
    Quantizer(
        "optimum_static",
        make_optimum_static,
        {
            "optimum static": (
                MODEL,
                "ORTQuantizer, avx512_vnni: QDQ, weights S8 per channel, activations U8, MinMax; "
                "Conv, Gemm and MatMul, and the same float layers as edge_ser",
            )
        },
    ),
    Quantizer(
        "modelopt_default",
        make_modelopt_default,
        {
            "modelopt default": (
                MODEL,
                "nvidia-modelopt: QDQ on float weights, S8, entropy, its own choice of operators; "
                "float parts kept in FP32 (it would make them FP16)",
            )
        },
    ),
    Quantizer(
        "modelopt_best",
        make_modelopt_best,
        {
            "modelopt best": (
                MODEL,
                "nvidia-modelopt: S8, max, MatMul and Conv, disable_mha_qdq, dq_only; made for "
                "TensorRT, run as it is",
            ),
            "modelopt best, U8": (
                "model_u8.onnx",
                "the same, its activations rewritten to U8 by export.qdq.unsigned, not by modelopt",
            ),
        },
    ),
    Quantizer(
        "onnxruntime_dynamic",
        make_dynamic,
        {
            "ONNX Runtime dynamic": (
                MODEL,
                "quantize_dynamic: weights S8 per channel, MatMul but the attention products",
            )
        },
    ),
    Quantizer(
        "onnxruntime_static",
        make_static,
        {
            "ONNX Runtime static, all operators": (
                MODEL,
                "quantize_static: QDQ, weights S8 per channel, activations U8, MinMax; all that it "
                "quantizes if nothing is chosen",
            )
        },
    ),
    Quantizer(
        "edge_ser",
        make_ours,
        {"edge_ser INT8": ("model_int8_x86.onnx", "export.quantize, as in a bundle")},
    ),
)

OURS_OF_RANDOM = Quantizer(
    "edge_ser",
    make_ours_of_random,
    {
        "edge_ser INT8": (
            "model_int8_x86.onnx",
            "export.quantize, without GPTQ and bias correction: the same graph with other numbers",
        )
    },
)
"""In the place of the last one, where answers mean nothing."""
