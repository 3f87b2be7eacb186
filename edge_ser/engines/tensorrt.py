"""TensorRT: a plan of fixed shape, run on one stream as one CUDA graph.

Samples go in through one page-locked buffer and logits come out through another; on a Jetson the
GPU reads and writes these themselves. `submit` returns at once, so the loop of a robot goes on
while the GPU works.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser.bundle import Bundle
from edge_ser.engines.build import Progress, build_plan, make_log, tensorrt_module
from edge_ser.engines.cuda import Cuda
from edge_ser.engines.layers import Layer, layers_of
from edge_ser.engines.plans import Key, building, cache_folder, digest, read, write
from edge_ser.errors import BundleError, EngineError

WARM_UP = 2  # runs before the one that is captured: the first ones allocate


class TensorrtEngine:
    """Runs a plan: input ``samples`` (batch, window), output ``logits`` (batch, C).

    Not for several threads at once.

    Attributes:
        device: The GPU and what runs it, e.g. ``"Orin, tensorrt 10.3.0"``.
        graph: The file that the plan was built of.
        classes: C.
        batch: Windows at once.
        window: Samples of a window.
        plan_mb: Size of the plan in MB of 10^6 bytes.
        file: Where the plan is kept; None where it is not.
    """

    file: Path | None = None

    def __init__(self, plan: bytes, graph: str, *, trt: Any, cuda: Cuda, log: Any) -> None:
        """Load a plan that was built here.

        Args:
            plan: See `edge_ser.engines.build.build_plan`.
            graph: The name of its graph.
            trt: See `edge_ser.engines.build.tensorrt_module`.
            cuda: The GPU; the engine closes it.
            log: See `edge_ser.engines.build.make_log`.

        Raises:
            EngineError: TensorRT refuses the plan, or there is no memory for it.
        """
        self.device = f"{cuda.name}, {trt.__name__} {trt.__version__}"
        self.graph, self.plan_mb = graph, len(plan) / 1e6
        self._trt, self._cuda, self._log = trt, cuda, log
        self._runtime = trt.Runtime(log)
        self._engine = self._there(self._runtime.deserialize_cuda_engine(plan), "load the plan")
        self._context = self._there(self._engine.create_execution_context(), "start")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if sorted(names) != ["logits", "samples"]:
            raise EngineError(f"{graph}: the plan has {names}; allowed: samples, logits")
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        self.batch, self.window = shapes["samples"]
        self.classes = shapes["logits"][1]
        self._samples = cuda.buffer(shapes["samples"])
        self._logits = cuda.buffer(shapes["logits"])
        for name, buffer in (("samples", self._samples), ("logits", self._logits)):
            self._there(self._context.set_tensor_address(name, buffer.device), f"take {name}")
        self._waiting = 0  # rows of the window that was submitted
        for _ in range(WARM_UP):
            self._queue()
        self._finish()
        self._launch: Callable[[], None] = cuda.capture(self._queue)

    def _there(self, value: Any, what: str) -> Any:
        if not value:
            said = self._log.error or "it does not say why; is the GPU's memory full?"
            raise EngineError(f"TensorRT cannot {what} of {self.graph}: {said}")
        return value

    def _queue(self) -> None:
        """Queue everything between the two buffers."""
        self._cuda.send(self._samples)
        self._there(self._context.execute_async_v3(self._cuda.stream), "run")
        self._cuda.fetch(self._logits)

    def _finish(self) -> None:
        self._cuda.mark()
        self._cuda.wait()

    def submit(self, samples: NDArray[np.float32]) -> None:
        """Begin to compute; `result` returns the logits.

        Args:
            samples: float32 of shape (N, T): N up to the batch, T up to the window. A shorter one
                is repeated until the window is full.

        Raises:
            EngineError: The shape does not fit, or a result was not fetched yet.
        """
        rows, length = samples.shape
        if self._waiting:
            raise EngineError("a window was submitted, and its result not fetched; call result()")
        if not (0 < rows <= self.batch and 0 < length <= self.window):
            raise EngineError(
                f"samples are {samples.shape}; this engine allows up to "
                f"{(self.batch, self.window)}: build one for more (edge-ser build)"
            )
        if length < self.window:
            samples = np.resize(samples.T, (self.window, rows)).T  # of 32 windows it takes 10 ms
        self._samples.host[:rows] = samples
        self._waiting = rows
        self._launch()
        self._cuda.mark()

    def finished(self) -> bool:
        """Return whether `result` would return at once."""
        return self._cuda.finished()

    def result(self) -> NDArray[np.float32]:
        """Wait for what was submitted; return its logits, float32 (N, C).

        Raises:
            EngineError: Nothing was submitted, or the GPU failed.
        """
        if not self._waiting:
            raise EngineError("nothing was submitted; call submit(samples) first")
        rows, self._waiting = self._waiting, 0
        self._cuda.wait()
        logits: NDArray[np.float32] = self._logits.host[:rows].copy()  # the next run overwrites it
        return logits

    def run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, C) of samples (N, T), any N; see `Engine` and `submit`."""
        parts = []
        for start in range(0, len(samples), self.batch):
            self.submit(samples[start : start + self.batch])
            parts.append(self.result())
        return np.concatenate(parts)

    def layers(self) -> list[Layer]:
        """Return the layers of the plan, with their precision and time; for a report, not often."""

        def run() -> None:
            self._queue()
            self._finish()

        return layers_of(self._trt, self._engine, self._context, run)

    def close(self) -> None:
        """Free everything, each thing before what it stands on; see `Engine`."""
        self._cuda.close()
        del self._launch, self._context, self._engine, self._runtime


def open_tensorrt(
    bundle: Bundle,
    *,
    precision: str = "int8",
    batch: int = 1,
    window_s: float | None = None,
    progress: Progress | None = None,
) -> TensorrtEngine:
    """Open the engine of a bundle; one that was not built here before is built now.

    Args:
        bundle: The bundle.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        batch: Windows at once.
        window_s: Length of a window in s; None means the bundle's.
        progress: Is told how far a build is.

    Raises:
        BundleError: It has no graph of this precision, or TensorRT does not take it.
        DeviceError: There is no GPU, or no driver for it.
        EngineError: The build or the start failed.
        MissingDependency: TensorRT or cuda-python is not installed.
    """
    graph, hashes = bundle.gpu_graph(precision)
    trt, cuda = tensorrt_module(), Cuda()  # without a driver, TensorRT itself would crash later
    log = make_log(trt)
    seconds = bundle.metadata.window_s if window_s is None else window_s
    key = Key(
        graph_sha256=digest(hashes),
        precision=precision,
        batch=batch,
        samples=round(seconds * bundle.metadata.sample_rate_hz),
        tensorrt=f"{trt.__name__} {trt.__version__}",
        gpu=cuda.name,
        compute_capability=cuda.compute_capability,
    )
    try:
        file = cache_folder() / key.file
        plan = _plan(trt, graph, key, file, log, progress)
        engine = TensorrtEngine(plan, graph.name, trt=trt, cuda=cuda, log=log)
    except BaseException:
        cuda.close()
        raise
    if engine.classes != (labels := len(bundle.metadata.labels)):
        engine.close()
        raise BundleError(f"{str(graph)!r} has {engine.classes} logits for {labels} labels")
    engine.file = file if file.exists() else None
    return engine


def _plan(
    trt: Any, graph: Path, key: Key, file: Path, log: Any, progress: Progress | None
) -> bytes:
    """Return the plan of a key, from the cache or built now."""
    with building(file):
        if (kept := read(file, key)) is not None:
            return kept
        timings = file.with_name(f"timing-{key.compute_capability}.cache")
        timing_key = Key("", "", 0, 0, key.tensorrt, key.gpu, key.compute_capability)
        known = read(timings, timing_key) or b""
        plan, known = build_plan(
            trt, graph, key.batch, key.samples, log=log, timing_cache=known, progress=progress
        )
        if known:
            write(timings, timing_key, known)
        write(file, key, plan)
    return plan
