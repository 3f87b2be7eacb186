"""The least time of a graph on a GPU: its roofline (Williams et al., CACM 52(4), 2009).

Either all multiplications at their peaks take longest, or reading every weight from memory once
does. Both are taken at 100 % efficiency, and what flows between layers is left out. Weights that
stay in the cache of the GPU from one run to the next could be read faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edge_ser.errors import EdgeSerError
from edge_ser.timing import noise

LAYERS = ("Conv", "Gemm", "MatMul")
PRECISIONS = ("int8", "fp16", "fp32")


@dataclass(frozen=True)
class Peak:
    """What a GPU can do.

    Attributes:
        int8: Dense operations of the tensor cores in INT8, 10^12 a second; a multiplication and
            its addition are two.
        fp16: The same in half precision.
        fp32: The same in TF32, which TensorRT, ONNX Runtime and convolutions of torch take for
            float32 of themselves.
        gb_s: Memory bandwidth in 10^9 bytes a second.
        source: Where the numbers are from.
    """

    int8: float
    fp16: float
    fp32: float
    gb_s: float
    source: str


_H100 = "NVIDIA H100 data sheet; those with sparsity, halved"
_A100 = "NVIDIA A100 data sheet"
_ORIN = "NVIDIA/Deep-Learning-Accelerator-SW and data sheets, INT8 with sparsity, halved; FP16 and "
_ORIN += "TF32 a half and a quarter of it, as of other tensor cores of Ampere; "

PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(1979, 989.5, 494.5, 3350, _H100),
    "NVIDIA H100 PCIe": Peak(1513, 756.5, 378, 2000, _H100),
    "NVIDIA H200": Peak(1979, 989.5, 494.5, 4800, "NVIDIA H200 data sheet; sparse ones halved"),
    "NVIDIA A100-SXM4-80GB": Peak(624, 312, 156, 2039, _A100),
    "NVIDIA A100-SXM4-40GB": Peak(624, 312, 156, 1555, _A100),
    "NVIDIA A100 80GB PCIe": Peak(624, 312, 156, 1935, _A100),
    "NVIDIA A100-PCIE-40GB": Peak(624, 312, 156, 1555, _A100),
    "NVIDIA L4": Peak(242.5, 121, 60, 300, "NVIDIA L4 data sheet; those with sparsity, halved"),
    "NVIDIA GeForce RTX 4090": Peak(
        660.6, 330.3, 82.6, 1008, "NVIDIA Ada GPU architecture; FP16 added up in FP16"
    ),
    "AGX Orin": Peak(85.5, 42.75, 21.375, 204.8, _ORIN + "64 GB, MAXN"),
    "Orin NX": Peak(30, 15, 7.5, 102.4, _ORIN + "16 GB, MAXN but not its super mode"),
    "Orin Nano": Peak(33.5, 16.75, 8.375, 102, _ORIN + "8 GB, super mode"),
}
"""By the name that CUDA tells; all of Orin are called alike there, so by the name of the board."""


def peak_of(gpu: str, board: str) -> Peak:
    """Return what a GPU can do.

    Args:
        gpu: Its name, as CUDA tells it.
        board: Name of the machine; on a Jetson that of the board.

    Raises:
        EdgeSerError: It is not known.
    """
    if gpu in PEAKS:
        return PEAKS[gpu]
    for name, peak in PEAKS.items():
        if "Orin" in gpu and name in board:
            return peak
    known = ", ".join(PEAKS)
    raise EdgeSerError(
        f"the peaks of {gpu!r} ({board}) are not known; known are {known}: add it to PEAKS in "
        "benchmarks/roofline.py"
    )


@dataclass(frozen=True)
class Work:
    """What a graph does for one window.

    Attributes:
        macs: Multiplications with their additions in convolutions and matrix products, by precision
            (`PRECISIONS`).
        weight_bytes: Of all constants as the graph holds them; read once for any number of windows.
    """

    macs: dict[str, int]
    weight_bytes: int

    def floor_ms(self, peak: Peak, batch: int) -> float:
        """Return the least time in ms of a batch of windows."""
        compute_s = sum(2e-12 * batch * n / getattr(peak, name) for name, n in self.macs.items())
        return 1e3 * max(compute_s, self.weight_bytes / (peak.gb_s * 1e9))


def work_of(file: Path, samples: int) -> Work:
    """Return what a graph does for one window. Runs it once on the processor, for its shapes.

    Args:
        file: Input ``samples`` (N, T); plain operators, INT8 as Q/DQ.
        samples: T.

    Raises:
        EdgeSerError: It is no such graph.
    """
    import onnx
    from onnx import TensorProto, external_data_helper

    from export.probe import session_of

    try:
        model = onnx.load(file, load_external_data=False)
        types = _types(onnx.shape_inference.infer_shapes(model).graph)
        sizes = [_bytes(tensor) for tensor in model.graph.initializer]
        external_data_helper.load_external_data_for_model(model, str(file.parent))
        layers = [node for node in model.graph.node if node.op_type in LAYERS]
        shapes = _shapes(model, layers, samples, session_of)
    except Exception as exc:  # those of onnx, ONNX Runtime and the disk share no base
        line = str(exc).partition("\n")[0]
        raise EdgeSerError(f"{str(file)!r} cannot be counted ({line})") from exc
    dequantized = {
        name
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output
    }
    macs = dict.fromkeys(PRECISIONS, 0)
    for node, (first, second, output) in zip(layers, shapes, strict=True):
        if {*node.input[:2]} <= dequantized:
            precision = "int8"
        else:
            precision = "fp16" if types[node.output[0]] == TensorProto.FLOAT16 else "fp32"
        macs[precision] += _macs(node, first, second, output)
    return Work(macs, sum(sizes))


def _types(graph: Any) -> dict[str, int]:
    values = (*graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _bytes(tensor: Any) -> int:
    from onnx import helper

    return prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _shapes(model: Any, layers: Sequence[Any], samples: int, session_of: Any) -> list[list[Any]]:
    """Return the shapes of the two factors and of the output of every layer."""
    from onnx import ValueInfoProto, helper

    graph = model.graph
    names = [[*node.input[:2], node.output[0]] for node in layers]
    asked = list(dict.fromkeys(name for three in names for name in three))
    for name in asked:
        graph.node.append(helper.make_node("Shape", [name], [f"{name}.shape"]))
    del graph.output[:]
    graph.output.extend(ValueInfoProto(name=f"{name}.shape") for name in asked)
    window = noise(1.0, samples)[np.newaxis]  # (1, samples)
    found = session_of(model).run(None, {"samples": window})
    shape_of = dict(zip(asked, (values.tolist() for values in found), strict=True))
    return [[shape_of[name] for name in three] for three in names]


def _macs(node: Any, first: Sequence[int], second: Sequence[int], output: Sequence[int]) -> int:
    if node.op_type == "Conv":  # the kernel: (out, in / groups, ...)
        return prod(output) * prod(second[1:])
    transposed = any(part.name == "transA" and part.i for part in node.attribute)
    return prod(output) * first[-2 if transposed else -1]
