"""Which parts of ONNX Runtime compute, and that nothing is sent back to the processor unasked."""

from __future__ import annotations

from typing import Any

from edge_ser.engines.plans import cache_folder
from edge_ser.errors import DeviceError

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
"""ONNX Runtime's names by device; the first takes what it can."""

# Operators that hear audio. Others may run on the processor also where a GPU does the work: ONNX
# Runtime computes there what is a matter of shapes.
_LAYERS = {
    "Conv", "MatMul", "Gemm", "FusedMatMul", "FusedConv", "LayerNormalization",
    "SkipLayerNormalization", "InstanceNormalization", "Softmax", "Gelu", "BiasGelu", "FastGelu",
    "Erf", "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ReduceMean",
}  # fmt: skip


def providers(device: str, available: list[str], *, precision: str = "fp32") -> list[Any]:
    """Return what to give ONNX Runtime for a device: names, and options of TensorRT.

    Args:
        device: One of `PROVIDERS`.
        available: What this ONNX Runtime was built with.
        precision: Of the graph: TensorRT must be allowed what the graph says.

    Raises:
        DeviceError: The device is not known, or not available.
        EngineError: There is no safe place for what TensorRT builds.
    """
    if device not in PROVIDERS:
        raise DeviceError(f"device is {device!r}; allowed: {', '.join(PROVIDERS)}")
    first, *others = PROVIDERS[device]
    if first not in available:
        raise DeviceError(
            f"device {device!r} needs {first}, this ONNX Runtime has "
            f'{", ".join(available)}; use cpu, or pip install "edge-ser[gpu]"'
        )
    if first != "TensorrtExecutionProvider":
        return [first, *others]
    folder = str(cache_folder())
    options = {
        "trt_engine_cache_enable": True, "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": True, "trt_timing_cache_path": folder,
        "trt_int8_enable": precision == "int8", "trt_fp16_enable": precision != "fp32",
    }  # fmt: skip
    return [(first, options), *others]


def watch_placement(options: Any, session_type: Any) -> None:
    """Let ONNX Runtime note which part takes which node, or refuse any on the processor.

    Args:
        options: Of the session of a GPU.
        session_type: ``onnxruntime.InferenceSession``; before 1.24 it notes nothing.
    """
    if hasattr(session_type, "get_provider_graph_assignment_info"):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    else:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")


def require_placement(session: Any, device: str) -> None:
    """Refuse a session of a GPU some of whose layers ONNX Runtime has sent to the processor.

    Raises:
        DeviceError: It has; the message names them.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # it was refused already
    back = [
        node.name or node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"][0]
        for node in part.get_nodes()
        if node.op_type in _LAYERS
    ]
    if back:
        raise DeviceError(
            f"ONNX Runtime sends {len(back)} layers from device {device!r} to the processor "
            f"({back[0]} first); use --engine tensorrt, or --device cpu"
        )
