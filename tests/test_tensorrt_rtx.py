"""What a compiler of NVIDIA makes of the graphs: TensorRT for RTX builds without a GPU."""

import re
import shutil
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import WavLMConfig, WavLMModel

from edge_ser.bundle import MODELS
from export.encoders.wav import WavEncoder
from export.encoders.wav2vec2 import load_wav2vec2
from export.graph import export_graph
from export.half import half
from export.qdq import QUANTIZED
from export.quantize import quantize, write_int8
from tests.speech_corpus import voice
from tests.test_wav2vec2 import SIZES

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this machine")

SIGNED, HALF, UNSIGNED = "model_int8.onnx", "model_int8_fp16.onnx", "model_int8_x86.onnx"
FEW = {"num_hidden_layers": 1, "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8)}


def wavlm(folder):
    WavLMModel(WavLMConfig(**SIZES | FEW)).save_pretrained(folder)
    return load_wav2vec2(str(folder), None, 1, 1)


GIVEN_BACK = -1
"""The layer of those that is given back: its weights alone are INT8."""

ENCODERS = {"wav": lambda _: WavEncoder(32, 1), "wavlm": wavlm}
"""WavLM has all that Wav2Vec2 has, and gates in its attention."""

EMBEDDED = ("default", "tiny")
"""They are Whisper, and the student that hears log-mel."""


class Mean(nn.Module):
    """An encoder and the least of heads: what is built is the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.classify = encoder, nn.Linear(encoder.dim, 3)

    def forward(self, samples):
        embedding = self.encoder(samples)[:, -1].mean(dim=1)
        return self.classify(embedding), embedding


def windows():
    return [voice(900.0 * (n + 1), 100.0 + 30 * n, 0.5 + 0.1 * n, n) for n in range(3)]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Return what makes a folder with the INT8 graphs of a network, once."""
    home = tmp_path_factory.mktemp("rtx")

    def made(name):
        folder = home / name
        if not folder.exists():
            if name in EMBEDDED:
                shutil.copytree(MODELS / name, folder)
            else:
                torch.manual_seed(0)
                encoder = ENCODERS[name](home / f"{name}-checkpoint").eval()
                folder.mkdir()
                export_graph(Mean(encoder).eval(), {}, 16000, folder / "model.onnx")
                _, int8, layers = quantize(onnx.load(folder / "model.onnx"), windows())
                write_int8(int8, folder, [layers[GIVEN_BACK]])
            onnx.save(half(folder / SIGNED, windows()), folder / HALF)
        return folder

    return made


class Log(trt.ILogger):
    """Keeps what the compiler tells."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, severity, message):
        self.lines += message.splitlines()


@dataclass(frozen=True)
class Layer:
    """A layer of the engine: types of what it takes, and the nodes that it stands for."""

    kind: str
    inputs: frozenset
    constants: frozenset
    outputs: frozenset
    nodes: frozenset

    @property
    def is_int8(self):
        """Whether it multiplies INT8; kernels of the kind `kgen` only convert to it."""
        return self.kind != "kgen" and "Int8" in self.inputs


def engine_layers(file):
    """Build a graph for one second at most, and return its layers, which the log lists."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        raise ValueError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)  # of the GPUs nearest to an Orin's
    profile = builder.create_optimization_profile()
    profile.set_shape("samples", (1, 6400), (1, 16000), (1, 16000))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.lines[-1]
    return [parsed(line) for line in log.lines if line.startswith("Name: ") and "LayerType" in line]


def parsed(line):
    parts = re.search(
        "LayerType: (.*?), Inputs: (.*)Constants: (.*)Outputs: (.*)Metadata: (.*)", line
    )
    kind, *values, nodes = parts.groups()
    types = (frozenset(re.findall(r"Datatype: (\w+)", value)) for value in values)
    return Layer(kind, *types, frozenset(re.findall(r"\[ONNX Layer: (.*?)\]", nodes)))


def check_int8(graph, layers):
    """Assert that INT8 is where the graph asks for it, and nowhere else.

    Every quantized node is in one INT8 layer. What reads one activation may share a layer, as the
    projections of an attention do. Every Q/DQ ends in an INT8 layer, but those behind a
    convolution, which this compiler does not merge into it. A layer that was given back multiplies
    float values, whose weights alone are INT8.
    """
    scaled = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    makers = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in QUANTIZED]
    quantized = [node for node in products if set(node.input[:2]) <= set(scaled)]
    constants = {tensor.name for tensor in graph.initializer}
    given_back = [
        node
        for node in products
        if node not in quantized
        and node.input[1] in scaled
        and scaled[node.input[1]].input[0] in constants
    ]
    int8 = [layer for layer in layers if layer.is_int8]
    assert quantized
    for node in quantized:
        holders = [layer for layer in int8 if node.name in layer.nodes]
        assert len(holders) == 1, f"{node.name} is in {len(holders)} INT8 layers"
        assert "Int8" in holders[0].constants, f"{node.name} has no INT8 weights"
    shared = {(node.op_type, scaled[node.input[0]].input[0]) for node in quantized}
    taken = {name for layer in int8 for name in layer.nodes}
    for node in products:
        assert node in quantized or node.name not in taken, f"{node.name} became INT8"
    for node in given_back:
        assert node.name not in taken
        assert scaled.pop(node.input[1]).name not in taken
    for node in scaled.values():
        source = makers.get(node.input[0])
        behind = source and makers[source.input[0]]
        assert behind is None or behind.op_type != "DequantizeLinear", (
            f"{node.name} is rounded twice"
        )
        if behind is None or behind not in quantized or behind.op_type != "Conv":
            assert node.name in taken, f"no INT8 layer takes {node.name}"
    assert len(int8) == len(shared)


def check_half(graph, layers):
    """Assert that what the graph multiplies in half, and in float32, is multiplied so."""
    scaled = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    halves = {
        tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16
    }
    constants = {tensor.name for tensor in graph.initializer}
    values = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    counts = Counter()
    for node in graph.node:
        if node.op_type not in QUANTIZED:
            continue
        held = [layer for layer in layers if node.name in layer.nodes]
        if values[node.output[0]] == TensorProto.FLOAT:
            kind = "front end"
            types = [layer.inputs | layer.constants for layer in held if layer.kind != "kgen"]
            right = types == [{"Float"}]
        elif node.input[0] in scaled:
            kind = "INT8"
            # Of INT8 convolutions this compiler keeps the sums in float32, and halves them after.
            sums = {"MatMul": {"Half"}, "Gemm": {"Half"}, "Conv": {"Float"}}[node.op_type]
            right = [layer.outputs for layer in held if layer.is_int8] == [sums]
        elif node.input[1] in scaled:
            kind = "given back"
            right = held and all(layer.inputs == {"Half"} for layer in held)
        elif node.input[1] in constants:
            kind = "layer"
            right = node.input[1] in halves and any("Half" in layer.constants for layer in held)
        else:
            kind = "product"
            right = held and all(layer.inputs == {"Half"} for layer in held)
        counts[kind] += 1
        assert right, (node.name, kind, held)
    return counts


def typed(file):
    return onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)).graph


def layers_as_asked(file):
    """Return the layers of an engine that has INT8 where the graph asks for it.

    On a busy machine this compiler has left a convolution out, twice in some hundred builds, of
    graphs in which it found it in all others. What a graph does wrong it does wrong in both.
    """
    layers = engine_layers(file)
    try:
        check_int8(typed(file), layers)
    except AssertionError:
        layers = engine_layers(file)
        check_int8(typed(file), layers)
    return layers


@pytest.mark.parametrize("name", [*ENCODERS, *EMBEDDED])
def test_int8_is_where_the_graph_asks_for_it(network, name):
    layers = layers_as_asked(network(name) / SIGNED)
    assert not any("Half" in layer.inputs | layer.outputs for layer in layers)


@pytest.mark.parametrize(
    ("name", "front_end", "products"),
    [("wav", 1, 2), ("wavlm", 1, 2), ("default", 2, 8), ("tiny", 2, 0)],
)
def test_so_it_is_beside_half(network, name, front_end, products):
    file = network(name) / HALF
    counts = check_half(typed(file), layers_as_asked(file))
    assert (counts["front end"], counts["product"]) == (front_end, products)
    assert counts["layer"] >= 1
    assert name in EMBEDDED or counts["given back"] == 1


STRAY = {
    "one side of a residual": ("Add", [0]),
    "before a norm": ("LayerNormalization", [0]),
    "one factor of a product": ("MatMul", [0]),
    "the other factor": ("MatMul", [1]),
    "both factors": ("MatMul", [0, 1]),
}


def strayed(file, op, places):
    """Return a graph with more Q/DQ, before inputs of the first such node without constants."""
    model = onnx.load(file)
    graph = model.graph
    # Neither constants nor what is rounded already.
    plain = {name for n in graph.node if n.op_type != "DequantizeLinear" for name in n.output}
    factors = 1 if op == "LayerNormalization" else 2
    at, node = next(
        (at, node)
        for at, node in enumerate(graph.node)
        if node.op_type == op and set(node.input[:factors]) <= plain
    )
    pairs = []
    for place in places:
        node.input[place] = pair_behind(graph, node.input[place], pairs)
    for new in reversed(pairs):
        graph.node.insert(at, new)
    return model


def pair_behind(graph, name, nodes):
    """Add Q/DQ of a value to nodes, and their scale to the graph; return what comes out."""
    scale, zero, stray = (f"{name}_{part}" for part in ("scale", "zero", "stray"))
    for part, value in ((scale, np.float32(0.05)), (zero, np.int8(0))):
        graph.initializer.append(numpy_helper.from_array(np.array(value), part))
    nodes += [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{stray}_q"], f"{stray}_q"),
        helper.make_node("DequantizeLinear", [f"{stray}_q", scale, zero], [stray], stray),
    ]
    return stray


@pytest.mark.parametrize("where", STRAY)
def test_a_stray_pair_is_refused(network, tmp_path, where):
    model = strayed(network("wav") / SIGNED, *STRAY[where])
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "stray.onnx")
    layers = engine_layers(tmp_path / "stray.onnx")
    lines = ("has no INT8 weights", "became INT8", "no INT8 layer takes .*_stray")
    with pytest.raises(AssertionError, match="|".join(lines)):
        check_int8(model.graph, layers)


def test_rounding_twice_is_refused(network, tmp_path):
    model = onnx.load(network("wav") / SIGNED)
    graph, pairs = model.graph, []
    at, node = next((at, n) for at, n in enumerate(graph.node) if n.op_type == "MatMul")
    node.input[0] = pair_behind(graph, node.input[0], pairs)
    for new in reversed(pairs):
        graph.node.insert(at, new)
    onnx.save(model, tmp_path / "twice.onnx")
    layers = engine_layers(tmp_path / "twice.onnx")
    with pytest.raises(AssertionError, match="is rounded twice"):
        check_int8(graph, layers)


def test_unsigned_activations_are_refused(network):
    with pytest.raises(ValueError, match="Non-zero zero point is not supported"):
        engine_layers(network("wav") / UNSIGNED)
