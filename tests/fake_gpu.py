"""A GPU that is not there: CUDA's runtime and TensorRT, as far as the engine calls them.

It holds its user to the contract: work on a stream happens late, memory lives while work that is
queued uses it, addresses are ones that the GPU can see, what stands on something goes before it. A
breach is an AssertionError. Names and parameters are checked against the real packages in
test_tensorrt_engine.py.
"""

# ruff: noqa: N802, N803, N815 (the names are CUDA's)

import ctypes
import json
from collections import Counter

import numpy as np
from cuda.bindings import runtime as real

from edge_ser.testing import expected_logits

OK = real.cudaError_t.cudaSuccess

# As the inspector of TensorRT 10 writes layers, with all details.
LAYERS = [
    {
        "Name": "Reformatting CopyNode for Input Tensor 0 to conv1", "LayerType": "Reformat",
        "Origin": "REFORMAT", "Inputs": [{"Format/Datatype": "Row major linear FP32"}],
    },
    {
        "Name": "conv1 + gelu", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8"},
        "Inputs": [{"Format/Datatype": "Row major Int8 format"}],
    },
    {"Name": "norm", "LayerType": "Myelin", "Inputs": [{"Datatype": "Half", "Format": "Linear"}]},
    {"Name": "mel", "LayerType": "CaskConvolution", "Weights": {"Type": "Float"}, "Inputs": []},
    {"Name": "softmax", "LayerType": "Myelin", "Inputs": []},
]  # fmt: skip


class Stream:
    def __init__(self, handle):
        self.handle, self.queue, self.captured = handle, [], None

    def __int__(self):
        return self.handle

    def add(self, work, uses):
        (self.queue if self.captured is None else self.captured).append((work, uses))


class FakeRuntime:
    """``cuda.bindings.runtime``.

    Attributes:
        fail: By the name of a function, the error that it returns from now on.
        live: What was made and not freed.
        calls: How often each function was called.
    """

    cudaError_t = real.cudaError_t
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaEventBlockingSync = real.cudaEventBlockingSync
    cudaHostAllocDefault = real.cudaHostAllocDefault
    cudaHostAllocMapped = real.cudaHostAllocMapped

    def __init__(self, *, integrated=False, memory=1 << 30, name=b"Orin", capability=(8, 7)):
        self.integrated, self.memory, self.name, self.capability = (
            integrated, memory, name, capability,
        )  # fmt: skip
        self.fail, self.calls = {}, Counter()
        self.live, self.kinds, self.streams = {}, {}, {}
        self.numbers = iter(range(1, 10_000))

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value
        self.calls[name] += 1
        error = self.fail.get(name) or self.fail.get("everything")
        return (lambda *_: (error, None)) if error else value

    # Devices

    def cudaDriverGetVersion(self):
        return OK, 13000

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaGetDeviceProperties(self, device):
        assert device == 0
        found = real.cudaDeviceProp()
        found.name = self.name.ljust(256, b"\0")
        found.major, found.minor = self.capability
        found.integrated = found.canMapHostMemory = int(self.integrated)
        return OK, found

    # Memory

    def _allocate(self, size, kind):
        if size > self.memory:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        self.memory -= size
        block = (ctypes.c_char * size)(*b"\x7f" * min(size, 8))  # whoever reads it sees garbage
        address = ctypes.addressof(block)
        self.live[address], self.kinds[address] = block, kind
        return OK, address

    def _free(self, address):
        assert address in self.live, "freed twice, or never allocated"
        for stream in self.streams.values():
            assert not any(address in uses for _, uses in stream.queue), "freed while in use"
        self.memory += len(self.live.pop(address))
        return (OK,)

    def cudaMalloc(self, size):
        return self._allocate(size, "device")

    def cudaHostAlloc(self, size, flags):
        assert flags in (self.cudaHostAllocDefault, self.cudaHostAllocMapped)
        return self._allocate(size, "mapped" if flags == self.cudaHostAllocMapped else "pinned")

    def cudaHostGetDevicePointer(self, pHost, flags):
        assert flags == 0 and self.kinds[pHost] == "mapped"
        return OK, pHost

    def cudaFree(self, devPtr):
        assert self.kinds[devPtr] == "device"
        return self._free(devPtr)

    def cudaFreeHost(self, ptr):
        assert self.kinds[ptr] in ("pinned", "mapped")
        return self._free(ptr)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        ways = {
            self.cudaMemcpyKind.cudaMemcpyHostToDevice: ("device", "pinned"),
            self.cudaMemcpyKind.cudaMemcpyDeviceToHost: ("pinned", "device"),
        }
        assert (self.kinds[dst], self.kinds[src]) == ways[kind]
        assert count == len(self.live[dst]) == len(self.live[src])
        self.streams[int(stream)].add(lambda: ctypes.memmove(dst, src, count), {dst, src})
        return (OK,)

    # Streams, events and graphs

    def _made(self, thing):
        number = next(self.numbers)
        self.live[number] = thing
        return number

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        stream = Stream(None)
        stream.handle = self._made(stream)
        self.streams[stream.handle] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream):
        assert not stream.queue
        del self.live[stream.handle], self.streams[stream.handle]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        while stream.queue:
            stream.queue.pop(0)[0]()
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        assert flags == self.cudaEventBlockingSync
        return OK, self._made(None)

    def cudaEventRecord(self, event, stream):
        assert stream.captured is None
        done = []
        self.live[event] = done, stream
        stream.add(lambda: done.append(True), set())
        return (OK,)

    def cudaEventQuery(self, event):
        """Let one piece of queued work happen."""
        done, stream = self.live[event]
        if done:
            return (OK,)
        stream.queue.pop(0)[0]()
        return (self.cudaError_t.cudaErrorNotReady,)

    def cudaEventSynchronize(self, event):
        done, stream = self.live[event]
        while not done:
            stream.queue.pop(0)[0]()
        return (OK,)

    def cudaEventDestroy(self, event):
        del self.live[event]
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert stream.captured is None
        stream.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        work, stream.captured = stream.captured, None
        return OK, self._made(work)

    def cudaGraphInstantiate(self, graph, flags):
        assert flags == 0 and self.live[graph]
        return OK, self._made(list(self.live[graph]))

    def cudaGraphDestroy(self, graph):
        del self.live[graph]
        return (OK,)

    def cudaGraphLaunch(self, graphExec, stream):
        assert stream.captured is None
        stream.queue += self.live[graphExec]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec):
        del self.live[graphExec]
        return (OK,)


def fake_tensorrt(runtime, version="10.3.0", title="tensorrt"):
    """Return a module that looks like ``tensorrt`` and computes on a `FakeRuntime`.

    Its plans are JSON, and their logits `edge_ser.testing.expected_logits`.
    """

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Context:
        def __init__(self, engine):
            self.engine, self.addresses = engine, {}
            engine.contexts += 1

        def __del__(self):
            self.engine.contexts -= 1

        profiler = None

        def set_tensor_address(self, name, memory):
            assert name in self.engine.shapes and runtime.kinds[memory] in ("device", "mapped")
            assert len(runtime.live[memory]) == 4 * np.prod(self.engine.shapes[name])
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            if module.broken or self.addresses.keys() != self.engine.shapes.keys():
                self.engine.log.log(ILogger.ERROR, "the context is broken\nin some file")
                return False
            samples, logits = (self._view(name) for name in ("samples", "logits"))

            def work():
                for row, answer in zip(samples, logits, strict=True):
                    answer[:] = expected_logits(row, len(answer))

            runtime.streams[stream_handle].add(work, set(self.addresses.values()))
            if self.profiler:
                assert runtime.streams[stream_handle].captured is None
                for layer in LAYERS[:-1]:  # the last one runs as a part of another
                    self.profiler.report_layer_time(layer["Name"], 0.25)
            return True

        def _view(self, name):
            shape = self.engine.shapes[name]
            values = np.frombuffer(runtime.live[self.addresses[name]], np.float32)
            return values.reshape(shape)

    class Engine:
        def __init__(self, log, shapes):
            self.log, self.shapes, self.contexts = log, shapes, 0
            self.num_io_tensors = len(shapes)

        def __del__(self):
            module.breaches += ["an engine went before its context"] * self.contexts

        def get_tensor_name(self, index):
            return list(self.shapes)[index]

        def get_tensor_shape(self, name):
            return self.shapes[name]

        def create_execution_context(self):
            return Context(self)

        def create_engine_inspector(self):
            return Inspector()

    class Inspector:
        def get_engine_information(self, format):
            assert format == "JSON"
            return json.dumps({"Layers": LAYERS, "Bindings": ["samples", "logits"]})

    class Runtime:
        def __init__(self, logger):
            self.log = logger

        def deserialize_cuda_engine(self, serialized_engine):
            try:
                plan = json.loads(serialized_engine)
                shapes = {name: tuple(shape) for name, shape in plan["shapes"].items()}
            except ValueError:
                self.log.log(ILogger.ERROR, "magic tag does not match")
                return None
            return Engine(self.log, shapes)

    class Tensor:
        def __init__(self, name, shape):
            self.name, self.shape = name, shape

    class Network:
        def __init__(self):
            self.inputs = [Tensor("samples", (-1, -1))]
            self.outputs = [Tensor("logits", (-1, 3)), Tensor("embedding", (-1, 1))]

        @property
        def num_outputs(self):
            return len(self.outputs)

        def get_input(self, index):
            return self.inputs[index]

        def get_output(self, index):
            return self.outputs[index]

        def unmark_output(self, tensor):
            self.outputs.remove(tensor)

    class Timings:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content + b"+"

    class Config:
        profiling_verbosity = progress_monitor = None

        def create_timing_cache(self, serialized_timing_cache):
            module.timings.append(serialized_timing_cache)
            return Timings(serialized_timing_cache)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch
            self.timings = cache
            return True

        def get_timing_cache(self):
            return self.timings

    class Builder:
        def __init__(self, logger):
            self.log = logger

        def create_network(self, flags):
            assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return Network()

        def create_builder_config(self):
            return Config()

        def build_serialized_network(self, network, config):
            module.builds += 1
            if module.broken:
                self.log.log(ILogger.ERROR, "no implementation within the memory\nof this GPU")
                return None
            if config.progress_monitor:
                config.progress_monitor.phase_start("Building", None, 2)
                config.progress_monitor.phase_start("inner", "Building", 9)
                assert config.progress_monitor.step_complete("Building", 0)
                config.progress_monitor.phase_finish("Building")
            rows = network.inputs[0].shape[0]
            outputs = {tensor.name: (rows, tensor.shape[1]) for tensor in network.outputs}
            shapes = {"samples": network.inputs[0].shape, **outputs}
            return json.dumps({"shapes": shapes}).encode()

    class OnnxParser:
        num_errors = 0

        def __init__(self, network, logger):
            pass

        def parse_from_file(self, model):
            return True

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    class ProfilingVerbosity:
        DETAILED = 2

    class IProgressMonitor:
        pass

    class IProfiler:
        pass

    class LayerInformationFormat:
        JSON = "JSON"

    module = type("Module", (), {})()
    module.__name__, module.__version__ = title, version
    module.broken, module.breaches, module.builds, module.timings = False, [], 0, []
    for one in (
        ILogger, Runtime, Builder, OnnxParser, NetworkDefinitionCreationFlag, ProfilingVerbosity,
        IProgressMonitor, IProfiler, LayerInformationFormat,
    ):  # fmt: skip
        setattr(module, one.__name__, one)
    module.parts = {
        "IExecutionContext": Context, "ICudaEngine": Engine, "INetworkDefinition": Network,
        "IBuilderConfig": Config, "ITimingCache": Timings, "Runtime": Runtime, "Builder": Builder,
        "OnnxParser": OnnxParser, "EngineInspector": Inspector,
    }  # fmt: skip
    return module
