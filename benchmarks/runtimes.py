"""What runs a network on a GPU: TensorRT, TensorRT for RTX, ONNX Runtime, and torch in four ways.

Each is an `Engine` for batches and windows of one size, from samples on the host to logits on the
host: what an application waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.networks import Graph, Network
from benchmarks.processes import first_line
from benchmarks.turns import Row
from edge_ser.engines.base import Engine
from edge_ser.engines.build import build_plan, make_log
from edge_ser.engines.cuda import Cuda
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.engines.tensorrt import TensorrtEngine
from edge_ser.errors import DeviceError, MissingDependency
from edge_ser.external_data import external_files

WARM_UP = 3  # runs before a CUDA graph is captured: the first ones allocate


@dataclass(frozen=True)
class Runtime:
    """One way to run a network.

    Attributes:
        title: Its name in the tables.
        packages: What its version is told by.
        reads: What it takes of a model.
        open: Makes an engine for a precision, a batch, and a window in samples; returns what its
            row tells as well.
        int8: Why it does not run INT8; empty where it does.
    """

    title: str
    packages: tuple[str, ...]
    reads: type[Graph] | type[Network]
    open: Callable[[Any, str, int, int], tuple[Engine, Row]]
    int8: str = ""


def open_tensorrt(
    module: str, graph: Graph, precision: str, batch: int, window: int
) -> tuple[Engine, Row]:
    """Build a plan and load it; nothing is taken from the cache of `edge-ser build`.

    Args:
        module: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        graph: Says its types itself.
        precision: That of the graph.
        batch: Windows at once.
        window: Samples of each.

    Raises:
        DeviceError: There is no GPU, or no driver for it.
        EdgeSerError: The build or the start failed.
        MissingDependency: The module or cuda-python is not installed.
    """
    try:
        trt = import_module(module)
    except ImportError as exc:
        pip = f"pip install {module.replace('_', '-')}"
        advice = (
            f"on a Jetson it comes with JetPack, elsewhere: {pip}" if module == "tensorrt" else pip
        )
        raise MissingDependency(f"{first_line(exc)}; {advice}") from exc
    cuda = Cuda()  # without a driver, TensorRT itself would crash later
    log = make_log(trt)
    try:
        start = time.perf_counter()
        plan, _ = build_plan(trt, graph.file, batch, window, log=log)
        build_s = time.perf_counter() - start
        engine = TensorrtEngine(plan, graph.file.name, trt=trt, cuda=cuda, log=log)
    except BaseException:
        cuda.close()
        raise
    return engine, {"build_s": build_s, "size_mb": engine.plan_mb}


def open_onnx(graph: Graph, precision: str, batch: int, window: int) -> tuple[Engine, Row]:
    """Open a graph with ONNX Runtime's CUDA provider; arguments and errors as of `OnnxEngine`."""
    files = [graph.file, *(graph.file.parent / name for name in external_files(graph.file))]
    engine = OnnxEngine(graph.file, device="cuda")
    return engine, {"size_mb": sum(file.stat().st_size for file in files) / 1e6}


def open_torch(
    compiled: bool,
    captured: bool,
    network: Network,
    precision: str,
    batch: int,
    window: int,
    device: str = "cuda",
) -> tuple[Engine, Row]:
    """Load a network into torch.

    Args:
        compiled: Whether `torch.compile` compiles it.
        captured: Whether it runs as one CUDA graph.
        network: What to load.
        precision: ``"fp32"``, or ``"fp16"``, see `halve`.
        batch: Windows at once.
        window: Samples of each.
        device: ``"cuda"``; tests take ``"cpu"``.

    Raises:
        DeviceError: Torch has no such device.
        EdgeSerError: The network cannot be loaded.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except Exception as exc:  # AssertionError, RuntimeError or AcceleratorError: as torch was built
        raise DeviceError(f"torch: {first_line(exc)}") from exc
    engine = TorchEngine(network.load(), compiled, captured, precision, batch, window, device)
    return engine, {"size_mb": engine.size_mb, "detail": engine.detail}


class TorchEngine:
    """Runs a network of torch; see `open_torch`.

    Attributes:
        device: What computes.
        graph: The name of the network's class.
        size_mb: Of its weights in MB of 10^6 bytes.
        detail: What was set.
    """

    def __init__(
        self,
        network: Any,
        compiled: bool,
        captured: bool,
        precision: str,
        batch: int,
        window: int,
        device: str,
    ) -> None:
        """Move the network to the device and run it as often as it takes to be warm."""
        import torch

        torch.set_float32_matmul_precision("high")  # TF32, as in TensorRT and ONNX Runtime
        details = ["TF32"]
        inner = getattr(network, "encoder", None)
        inner = getattr(inner, "model", None)
        if getattr(inner, "_supports_sdpa", False):  # a network of transformers
            inner.set_attn_implementation("sdpa")
            details.append("attention sdpa")
        self._half = precision == "fp16"
        if self._half:
            halve(network, device)
            details.append("layers and attention in half (autocast), norms and front end not")
        network.to(device)
        self.graph, self.detail = type(network).__name__, ", ".join(details)
        self.device = f"{device}, torch {torch.__version__}"
        tensors = [*network.parameters(), *network.buffers()]
        self.size_mb = sum(tensor.nbytes for tensor in tensors) / 1e6
        self._torch, self._kind, self._compiled = torch, device, compiled
        self._network = torch.compile(network, dynamic=False) if compiled else network
        self._host = torch.zeros(batch, window, pin_memory=device == "cuda")
        self._samples = torch.zeros(batch, window, device=device)
        self._step: Callable[[], Any] = self._compute
        if captured:
            self._capture()

    def _compute(self) -> Any:
        torch = self._torch
        # Without its cache, for a CUDA graph must not refer to what the cache frees.
        half = torch.autocast(self._kind, torch.float16, self._half, cache_enabled=False)
        with torch.inference_mode(), half:
            logits, _ = self._network(self._samples)
        return logits

    def _capture(self) -> None:
        """Record the whole network once; from then on a run is one launch."""
        torch, stream = self._torch, self._torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            logits = self._compute()

        def replay() -> Any:
            recorded.replay()
            return logits

        self._step = replay

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, C) of samples (N, T): N and T are batch and window; see `Engine`."""
        self._host.copy_(self._torch.from_numpy(samples))
        self._samples.copy_(self._host, non_blocking=True)
        logits: NDArray[np.float32] = self._step().float().cpu().numpy()  # waits for the GPU
        return logits

    def close(self) -> None:
        """Give the memory back; see `Engine`."""
        del self._network, self._step, self._samples
        if self._compiled:
            self._torch._dynamo.reset()
        if self._kind == "cuda":
            self._torch.cuda.empty_cache()


def halve(network: Any, device: str) -> None:
    """Change a network so that `torch.autocast` runs it as `export.half` writes graphs.

    The weights of layers are stored in half, or they would be converted in every run. Log-mel and
    the first convolution over samples stay float32, which autocast would not leave them.

    Args:
        network: In evaluation mode.
        device: Where it will run, as autocast names it.
    """
    import torch
    from torch import nn

    from export.frontend import LogMel

    class Full(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, samples: Any) -> Any:
            with torch.autocast(device, enabled=False):
                return self.inner(samples.float())

    def hears_samples(module: nn.Module) -> bool:
        return isinstance(module, LogMel) or (
            isinstance(module, nn.Conv1d) and module.in_channels == 1
        )

    for parent in [*network.modules()]:
        for name, child in [*parent.named_children()]:
            if hears_samples(child):
                setattr(parent, name, Full(child))
            elif isinstance(child, nn.Linear | nn.Conv1d):
                child.half()


_NO_INT8 = "torch has no INT8 convolution for a GPU"

RUNTIMES = {
    "tensorrt": Runtime("TensorRT", ("tensorrt",), Graph, partial(open_tensorrt, "tensorrt")),
    "tensorrt_rtx": Runtime(
        "TensorRT for RTX", ("tensorrt_rtx",), Graph, partial(open_tensorrt, "tensorrt_rtx")
    ),
    "onnxruntime": Runtime(
        "ONNX Runtime CUDA",
        ("onnxruntime", "onnxruntime-gpu"),
        Graph,
        open_onnx,
        "ONNX Runtime would send INT8 back to the processor",
    ),
    **{
        name: Runtime(title, ("torch",), Network, partial(open_torch, *how), _NO_INT8)
        for name, title, how in (
            ("torch", "torch, eager", (False, False)),
            ("torch-compile", "torch, compiled", (True, False)),
            ("torch-graph", "torch, CUDA graph", (False, True)),
            ("torch-compile-graph", "torch, compiled, CUDA graph", (True, True)),
        )
    },
}
