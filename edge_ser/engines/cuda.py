"""The few calls of CUDA that an engine makes. Its error codes become ours here, nowhere else."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ser.errors import DeviceError, EngineError, MissingDependency

_ADVICE = {
    "cudaErrorMemoryAllocation": "the GPU's memory is full; close other programs on it, or build "
    "for a smaller batch",
    "cudaErrorInsufficientDriver": "there is no driver, or it is too old; use --engine onnx",
    "cudaErrorNoDevice": "there is no GPU; use --engine onnx",
}
_LOST = "the GPU is lost for this process; start it again"


@dataclass(frozen=True)
class Buffer:
    """Memory that processor and GPU both know.

    Attributes:
        host: What the processor writes and reads: float32, page-locked.
        device: Where the GPU has it. On an integrated GPU it is the same memory.
        size: In bytes.
    """

    host: NDArray[np.float32]
    device: int
    size: int


class Cuda:
    """The first GPU, one stream on it, and what was allocated for it.

    Attributes:
        name: Of the GPU.
        compute_capability: E.g. ``"8.7"``.
        integrated: Whether it shares its memory with the processor, as on a Jetson.
        stream: Handle of the stream.
    """

    def __init__(self) -> None:
        """Find the GPU.

        Raises:
            DeviceError: There is none, or no driver for it.
            MissingDependency: cuda-python is not installed.
        """
        try:
            from cuda.bindings import runtime  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as exc:
            line = 'cuda-bindings is not installed; run: pip install "edge-ser[tensorrt]"'
            raise MissingDependency(line) from exc
        self._runtime: Any = runtime
        self._release: list[Callable[[], object]] = []
        try:
            self._call("cudaGetDeviceCount")
            found = self._call("cudaGetDeviceProperties", 0)
        except EngineError as exc:
            raise DeviceError(str(exc)) from exc
        self.name = found.name.decode().rstrip("\0")
        self.compute_capability = f"{found.major}.{found.minor}"
        self.integrated = bool(found.integrated and found.canMapHostMemory)
        self._stream = self._own("cudaStreamDestroy", "cudaStreamCreateWithFlags", "NonBlocking")
        self._event = self._own("cudaEventDestroy", "cudaEventCreateWithFlags", "BlockingSync")
        self.stream = int(self._stream)

    def _own(self, destroy: str, create: str, flag: str) -> Any:
        kind = create.removeprefix("cuda").removesuffix("CreateWithFlags")
        made = self._call(create, getattr(self._runtime, f"cuda{kind}{flag}"))
        self._release.append(lambda: self._call(destroy, made))
        return made

    def _call(self, name: str, *args: Any) -> Any:
        """Call CUDA and return its value, if it has one."""
        error, *values = getattr(self._runtime, name)(*args)
        if error != self._runtime.cudaError_t.cudaSuccess:
            advice = _ADVICE.get(error.name, _LOST)
            raise EngineError(f"CUDA: {error.name} in {name}: {advice}")
        return values[0] if values else None

    def buffer(self, shape: tuple[int, ...]) -> Buffer:
        """Return zeros of a shape that processor and GPU both know.

        Raises:
            EngineError: There is no memory left.
        """
        runtime, size = self._runtime, 4 * math.prod(shape)
        flags = runtime.cudaHostAllocMapped if self.integrated else runtime.cudaHostAllocDefault
        pinned = self._call("cudaHostAlloc", size, flags)
        self._release.append(lambda: self._call("cudaFreeHost", pinned))
        if self.integrated:
            device = self._call("cudaHostGetDevicePointer", pinned, 0)
        else:
            device = self._call("cudaMalloc", size)
            self._release.append(lambda: self._call("cudaFree", device))
        host = np.ctypeslib.as_array((ctypes.c_float * (size // 4)).from_address(int(pinned)))
        host[:] = 0
        return Buffer(host.reshape(shape), int(device), size)

    def send(self, buffer: Buffer) -> None:
        """Queue the copy of a buffer to the GPU, if it is not there already."""
        self._copy(buffer.device, buffer.host.ctypes.data, buffer.size, "HostToDevice")

    def fetch(self, buffer: Buffer) -> None:
        """Queue the copy of a buffer from the GPU, if it is not here already."""
        self._copy(buffer.host.ctypes.data, buffer.device, buffer.size, "DeviceToHost")

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        if not self.integrated:
            way = getattr(self._runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
            self._call("cudaMemcpyAsync", to, source, size, way, self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what queues at once all that some work queues on the stream.

        Args:
            work: Its addresses and shapes stay as they are.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self._stream)
        made = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._release.append(lambda: self._call("cudaGraphExecDestroy", made))
        return lambda: self._call("cudaGraphLaunch", made, self._stream)

    def mark(self) -> None:
        """Note what is queued now, for `finished` and `wait`."""
        self._call("cudaEventRecord", self._event, self._stream)

    def finished(self) -> bool:
        """Return whether all that was queued before `mark` is done."""
        (error,) = self._runtime.cudaEventQuery(self._event)
        if error == self._runtime.cudaError_t.cudaErrorNotReady:
            return False
        self._call("cudaEventQuery", self._event)
        return True

    def wait(self) -> None:
        """Sleep until all that was queued before `mark` is done."""
        self._call("cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Wait for what runs, and free everything."""
        try:
            self._call("cudaStreamSynchronize", self._stream)
        finally:
            while self._release:
                self._release.pop()()
