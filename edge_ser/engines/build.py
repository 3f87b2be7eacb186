"""A graph becomes a plan: what TensorRT, or TensorRT for RTX, compiles it to for one GPU.

The graph says every type itself (strongly typed, explicit Q/DQ), which is the only form that both
TensorRT 10 and 11 take; there is no calibration here and no choice of precision. Shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_ser.errors import BundleError, EngineError, MissingDependency

Progress = Callable[[str, int, int], None]
"""Is told a phase, the steps done, and all of its steps."""


def tensorrt_module() -> Any:
    """Return ``tensorrt``, or ``tensorrt_rtx`` where that one is not installed.

    Raises:
        MissingDependency: Neither is, or the first one is there and cannot be imported.
    """
    try:
        import tensorrt  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return tensorrt
    except ImportError as exc:
        if exc.name != "tensorrt":  # it is there, and something that it needs is not
            raise MissingDependency(
                f"TensorRT is installed, and cannot be imported ({exc}); in a container, take an "
                "image for this JetPack, and --runtime nvidia"
            ) from exc
    try:
        import tensorrt_rtx  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return tensorrt_rtx
    except ImportError as exc:
        raise MissingDependency(
            "TensorRT is not installed: on a Jetson it comes with JetPack (make the environment "
            "with --system-site-packages), elsewhere: pip install tensorrt"
        ) from exc


def make_log(trt: Any) -> Any:
    """Return a logger of TensorRT that keeps the last error in its attribute ``error``."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.error = message.partition("\n")[0]

    return Log()


def build_plan(
    trt: Any,
    graph: Path,
    batch: int,
    samples: int,
    *,
    log: Any,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
    configure: Callable[[Any], None] | None = None,
) -> tuple[bytes, bytes]:
    """Compile a graph.

    Args:
        trt: See `tensorrt_module`.
        graph: Its weights may lie in files beside it.
        batch: Windows at once.
        samples: Length of each.
        log: See `make_log`.
        timing_cache: What an earlier build on this GPU found out; what does not fit is ignored.
        progress: Is told how far it is.
        configure: Changes the configuration last.

    Returns:
        The plan, and the timing cache for the next build; TensorRT for RTX has none.

    Raises:
        BundleError: TensorRT does not take the graph.
        EngineError: The build failed.
    """
    builder = trt.Builder(log)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = parser.get_error(0).desc() if parser.num_errors else log.error
        raise BundleError(f"TensorRT does not take {str(graph)!r}: {said.partition(chr(10))[0]}")
    network.get_input(0).shape = (batch, samples)
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        if tensor.name != "logits":
            network.unmark_output(tensor)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the report of layers
    if progress:
        config.progress_monitor = _monitor(trt, progress)
    times = trt.__name__ == "tensorrt"  # that for RTX compiles without trying, and warns
    if times:
        timings = config.create_timing_cache(timing_cache)
        config.set_timing_cache(timings, ignore_mismatch=True)
    if configure:
        configure(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT cannot build {graph.name}: {log.error or 'it does not say why'}"
        )
    return bytes(plan), bytes(config.get_timing_cache().serialize()) if times else b""


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return a monitor that tells of the outermost phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[phase] = steps
                progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(phase, step + 1, self.steps[phase])
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            if steps := self.steps.pop(phase, 0):
                progress(phase, steps, steps)

    return Monitor()
