"""ONNX Runtime. Its exceptions become ours here, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser.engines.providers import PROVIDERS, providers, require_placement, watch_placement
from edge_ser.errors import BundleError, DeviceError, EngineError, MissingDependency


class OnnxEngine:
    """Runs an ONNX graph: input ``samples`` (N, T), outputs ``logits`` (N, C) and ``embedding``.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``.
        graph: The name of the file, with ``" (float)"`` behind it when its INT8 layers run so.
        classes: C, how many logits a window has.
        properties: The graph's ``metadata_props``.
    """

    def __init__(
        self,
        graph: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        precision: str = "int8",
        float_arithmetic: bool = False,
    ) -> None:
        """Open a graph.

        Args:
            graph: The ONNX file. Its weights may lie in files beside it.
            threads: How many threads compute, 1 or more; None means one for each core.
            device: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``, all of them of ONNX Runtime.
            precision: Of the graph; the provider of TensorRT asks.
            float_arithmetic: Compute quantized layers in float: the same rounding, no INT8 kernels.

        Raises:
            BundleError: The graph cannot be opened, or has other inputs or outputs.
            DeviceError: The device is not there, or would leave layers to the processor.
            EngineError: ``threads`` is not allowed.
            MissingDependency: ONNX Runtime is not installed.
        """
        try:
            import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        except ImportError as exc:
            line = 'onnxruntime is not installed; run: pip install "edge-ser[cpu]"'
            raise MissingDependency(line) from exc
        if threads is not None and (type(threads) is not int or threads < 1):
            raise EngineError(
                f"threads is {threads!r}; allowed: 1 or more, or None for one per core"
            )
        available = onnxruntime.get_available_providers()
        chosen = providers(device, available, precision=precision)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails arrives as an exception, once
        options.intra_op_num_threads = threads or 0
        # A waiting thread must not burn a core: on a robot the other processes need it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # A layer with INT8 weights that reads float values must not round these after all.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if device != "cpu":
            watch_placement(options, onnxruntime.InferenceSession)
        if float_arithmetic:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(graph), options, providers=chosen, enable_fallback=0
            )
        except Exception as exc:  # ONNX Runtime's exceptions share no other base
            raise BundleError(f"{str(graph)!r} cannot be opened: {_first_line(exc)}") from exc
        first = PROVIDERS[device][0]
        if self._session.get_providers()[0] != first:
            raise DeviceError(f"ONNX Runtime could not start {first}; check its libraries")
        if device != "cpu":
            require_placement(self._session, device)
        self.device = device
        self.graph = f"{graph.name} (float)" if float_arithmetic else graph.name
        self.properties: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.classes = self._check_shapes(graph)

    def _check_shapes(self, graph: Path) -> int:
        """Refuse a graph with other inputs or outputs; return the number of classes."""

        def require(valid: bool, nodes: Any, allowed: str) -> None:
            if not valid:
                got = ", ".join(f"{node.name!r} {node.type} {node.shape}" for node in nodes)
                raise BundleError(f"{str(graph)!r} has {got}; allowed: {allowed}")

        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [(node.name, node.type, len(node.shape)) for node in inputs]
        valid = found == [("samples", "tensor(float)", 2)]
        valid = valid and not any(type(size) is int for size in inputs[0].shape)
        require(valid, inputs, "one input, 'samples' tensor(float) ['N', 'T'], both of any size")
        shapes = {node.name: node.shape for node in outputs if node.type == "tensor(float)"}
        logits, embedding = shapes.get("logits", []), shapes.get("embedding", [])
        valid = len(logits) == len(embedding) == 2 and type(logits[1]) is int
        allowed = "'logits' tensor(float) ['N', classes], 'embedding' tensor(float) ['N', D]"
        require(valid, outputs, allowed)
        return int(logits[1])

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, C) of samples (N, T); see `Engine`."""
        try:
            (logits,) = self._session.run(["logits"], {"samples": samples})
        except Exception as exc:  # ONNX Runtime's exceptions share no other base
            raise EngineError(f"{self.graph} failed on {self.device}: {_first_line(exc)}") from exc
        return logits  # type: ignore[no-any-return]

    def close(self) -> None:
        """Release the session; see `Engine`."""
        del self._session


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
