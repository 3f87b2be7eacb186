"""Engines, and the choice of one for a bundle on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from edge_ser.bundle import INT8_GRAPH, X86_GRAPH, Bundle
from edge_ser.engines.base import Engine
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.errors import BundleError, DeviceError, EngineError

ENGINES = ("onnx", "tensorrt")


def open_engine(
    bundle: Bundle,
    *,
    engine: str = "onnx",
    precision: str = "int8",
    threads: int | None = None,
    device: str = "cpu",
    fallback: str | None = None,
) -> Engine:
    """Open the engine of a bundle.

    Args:
        bundle: The bundle.
        engine: ``"onnx"``: ONNX Runtime; ``"tensorrt"``: TensorRT, which builds first what it has
            not built here before.
        precision: ``"int8"`` or ``"fp32"``; of TensorRT also ``"fp16"``.
        threads: See `OnnxEngine`.
        device: See `OnnxEngine`; ``"cuda"`` runs no INT8.
        fallback: ``"onnx"``: where TensorRT fails, at the start or later, ONNX Runtime goes on
            with INT8 on the processor, and the log says so; None: it is an error.

    Raises:
        BundleError: The graph is missing, damaged, or contradicts the metadata.
        DeviceError: The device is not there, or does not run this precision.
        EngineError: The engine is not known, fails to start, or computes wrongly on this machine.
        MissingDependency: ONNX Runtime, TensorRT or cuda-python is not installed.
    """
    if engine not in ENGINES or fallback not in (None, "onnx"):
        raise EngineError(
            f"engine is {engine!r}, fallback {fallback!r}; allowed: {' or '.join(ENGINES)}, and "
            "'onnx' or None"
        )
    if engine == "onnx":
        return open_onnx(bundle, precision=precision, threads=threads, device=device)

    def on_gpu() -> Engine:
        from edge_ser.engines.tensorrt import open_tensorrt

        return open_tensorrt(bundle, precision=precision)

    if fallback is None:
        return on_gpu()
    from edge_ser.engines.fallback import FallbackEngine

    return FallbackEngine(on_gpu, lambda: open_onnx(bundle, threads=threads))


def open_onnx(
    bundle: Bundle,
    *,
    precision: str = "int8",
    threads: int | None = None,
    device: str = "cpu",
    vnni: bool | None = None,
) -> OnnxEngine:
    """Open the graph of a bundle that suits this machine.

    On x86 without VNNI the INT8 kernels add two products in 16 bits, which can saturate. There the
    bundle's self-test decides: if it fails, the INT8 layers are computed in float, and that is
    logged and named by the engine.

    Args:
        bundle: The bundle.
        precision: ``"int8"`` or ``"fp32"``; on a GPU also ``"fp16"``.
        threads: See `OnnxEngine`.
        device: See `OnnxEngine`; ``"cuda"`` runs no INT8.
        vnni: Whether the processor has VNNI; None means to look.

    Raises:
        BundleError: The graph is missing, damaged, or contradicts the metadata.
        DeviceError: The device is not there, or does not run this precision.
        EngineError: The self-test was needed and failed in float too.
        MissingDependency: ONNX Runtime is not installed.
    """
    if precision == "int8" and device == "cuda":
        raise DeviceError(
            "precision 'int8' on device 'cuda': ONNX Runtime would send it back to the CPU; "
            "use fp16 or fp32 on cuda, or int8 on cpu or tensorrt"
        )
    graph = bundle.graph(precision) if device == "cpu" else bundle.gpu_graph(precision)[0]
    engine = OnnxEngine(graph, threads=threads, device=device, precision=precision)
    _check_against(bundle, graph, engine)
    if graph.name != X86_GRAPH or (has_vnni() if vnni is None else vnni):
        return engine
    return _without_vnni(bundle, engine, threads)


def _without_vnni(bundle: Bundle, engine: OnnxEngine, threads: int | None) -> OnnxEngine:
    """Return the engine if it computes the self-test rightly, else one that computes in float."""
    # Few machines come here; the others need not wait for these modules.
    import logging

    from edge_ser.selftest import TOLERANCE, deviation

    saturated = deviation(bundle, engine)
    if saturated <= TOLERANCE:
        return engine
    engine.close()
    graph = bundle.graph("int8", machine="aarch64")  # signed activations
    engine = OnnxEngine(graph, threads=threads, float_arithmetic=True)
    _check_against(bundle, graph, engine)
    if not deviation(bundle, engine) <= TOLERANCE:
        raise EngineError(
            f"bundle {str(bundle.path)!r} fails its self-test on this processor; use fp32"
        )
    logging.getLogger("edge_ser").warning(
        f"no VNNI, and the self-test of {X86_GRAPH} is off by {saturated:.2g} "
        f"(allowed: {TOLERANCE:g}): {INT8_GRAPH} runs in float, more slowly"
    )
    return engine


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor has VNNI; False where that cannot be found out."""
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _check_against(bundle: Bundle, graph: Path, engine: OnnxEngine) -> None:
    """Refuse a graph that contradicts the metadata."""
    labels = len(bundle.metadata.labels)
    if engine.classes != labels:
        raise BundleError(f"{str(graph)!r} has {engine.classes} logits for {labels} labels")
    for key, expected in bundle.metadata.graph_properties().items():
        text = engine.properties.get(key)
        try:
            matches = json.loads(text or "null") == expected
        except ValueError:
            matches = False
        if not matches:
            raise BundleError(f"{str(graph)!r} says {key} is {text!r}, metadata.json {expected!r}")
