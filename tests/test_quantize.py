import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.encoders.mel import MelEncoder
from export.encoders.whisper import WhisperStem, load_whisper
from export.frames import over_time, turned_weights
from export.graph import export_graph
from export.half import HALVES, make_halves
from export.heads import CnnHead
from export.model import Classifier
from export.pairs import largest_sum
from export.qdq import (
    QUANTIZED,
    WEIGHTS,
    float_nodes,
    give_unrounded,
    save_with_shared_weights,
)
from export.quantize import calibrate, make_int8, quantize, softened
from export.recipe import Quantize
from export.rounding import second_moments
from tests.speech_corpus import make_whisper, voice

PROPERTIES = {"labels": ["a", "b", "c"], "sample_rate_hz": 16000, "schema_version": 1}
COPIES = ("Concat", "Pad", "Slice", "Transpose")  # what makes frames of integers
SIGNED, UNSIGNED = "model_int8.onnx", "model_int8_x86.onnx"


def windows():
    return [voice(500.0 * (n + 1), 100.0 + 10 * n, 0.5 + 0.07 * n, n) for n in range(6)]


def whisper(folder):
    make_whisper(folder)
    return load_whisper(str(folder), 2, 1.0, 3)


def mel(_):
    return MelEncoder(WhisperStem(16, 8), 16, 2)


@pytest.fixture(scope="module", params=[whisper, mel], ids=["whisper", "mel"])
def folder(request, tmp_path_factory):
    """Return a folder with the full-precision graph and what `quantize` makes of it."""
    made = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    encoder = request.param(made)
    model = Classifier(encoder, CnnHead(encoder.states, encoder.dim, 3, width=8)).eval()
    export_graph(model, PROPERTIES, 16000, made / "model.onnx")
    (made / "graph").mkdir()
    (made / "model.onnx").rename(made / "graph" / "model.onnx")
    make_int8(made / "graph", windows(), windows()[:2], Quantize(most_float=0), made)
    return made


def constants(graph):
    """Return arrays by name; the weights that a convolution's product reads as they are stored."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return found | {name: found[stored] for name, stored in turned_weights(graph).items()}


def load(folder, name):
    return onnx.load(folder / name).graph


def layers(graph):
    """Return Conv, Gemm and MatMul: by name, the nodes before their first and second input."""
    producers = {output: node for node in graph.node for output in node.output}
    return {
        node.name: [producers.get(name) for name in node.input[:2]]
        for node in graph.node
        if node.op_type in QUANTIZED
    }


def is_dequantized(node):
    return node is not None and node.op_type == "DequantizeLinear"


@pytest.mark.parametrize(
    ("name", "zero_point", "dtype"), [(SIGNED, 0, np.int8), (UNSIGNED, 128, np.uint8)]
)
def test_activations_are_quantized_symmetrically(folder, name, zero_point, dtype):
    graph = load(folder, name)
    values = constants(graph)
    found = [n for n in graph.node if is_dequantized(n) and n.input[0] not in values]
    assert found
    for node in found:
        scale, zero = (values[part] for part in node.input[1:3])
        assert scale.shape == zero.shape == ()
        assert scale > 0
        assert (zero, zero.dtype) == (zero_point, dtype)


@pytest.mark.parametrize("name", [SIGNED, UNSIGNED])
def test_what_is_quantized_is_dequantized_alike_but_for_what_a_zero_point_subtracts(folder, name):
    graph = load(folder, name)
    values = constants(graph)
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    copied = {node.output[0]: node.input[0] for node in graph.node if node.op_type in COPIES}
    readers = []
    for node in graph.node:
        if is_dequantized(node):
            integers = node.input[0]
            while integers in copied:
                integers = copied[integers]
            if integers in quantizers:
                readers.append((node, quantizers[integers]))
    assert len(readers) >= len(quantizers)
    shifted = 0
    for node, quantizer in readers:
        assert node.input[1] == quantizer.input[1]
        zero = values[quantizer.input[2]]
        if node.input[2] != quantizer.input[2]:
            shifted += 1
            assert zero < 100  # what is of one side needs nearly half of the steps
        assert zero.dtype == values[node.input[2]].dtype
    # That of log-mel has weights so small that a GELU gives values of two sides.
    assert bool(shifted) == (name == UNSIGNED and (folder / "config.json").exists())


@pytest.mark.parametrize("name", [SIGNED, UNSIGNED])
def test_weights_are_int8_per_channel_with_zero_points_0(folder, name):
    graph = load(folder, name)
    values = constants(graph)
    found = 0
    for _, weight in layers(graph).values():
        if not is_dequantized(weight) or weight.input[0] not in values:
            continue
        found += 1
        integers, scales, zeros = (values[part] for part in weight.input)
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        axis = 0 if integers.ndim > 2 else axis  # stored as a convolution's, read as a product's
        assert integers.dtype == zeros.dtype == np.int8
        assert not zeros.any()
        assert scales.shape == zeros.shape == (integers.shape[axis],)
        others = tuple(i for i in range(integers.ndim) if i != axis)
        largest = np.abs(integers.astype(int)).max(axis=others)
        # The scale is that of the nearest steps; `round_weights` may move the largest by a few.
        assert ((largest >= 100) & (largest <= 127)).all()
    assert found >= 8


@pytest.mark.parametrize("pairs", [True, False])
def test_no_pair_of_weights_overflows_if_that_is_asked(folder, pairs):
    settings = Quantize(turning=False, centring=False, bias_correction=False, pairs=pairs)
    int8 = quantize(onnx.load(folder / "model.onnx"), windows(), settings)[1]
    assert (largest_sum(int8) <= 128) == pairs


@pytest.mark.parametrize("name", [SIGNED, UNSIGNED])
def test_biases_stay_float(folder, name):
    graph = load(folder, name)
    values = constants(graph)
    biases = [n.input[2] for n in graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2]
    assert biases
    assert {values[bias].dtype for bias in biases} == {np.dtype(np.float32)}
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in graph.initializer)


def test_front_end_attention_and_last_layer_stay_float(folder):
    fp32, int8 = load(folder, "model.onnx"), load(folder, SIGNED)
    values = constants(fp32)
    # The two layers whose sum is the logits.
    last = {"head.members.0.classify.bias", "head.probe.bias"}
    expected = {node.name for node in fp32.node if last & set(node.input)}
    for node in fp32.node:
        if node.op_type == "MatMul" and node.input[1] not in values:
            expected.add(node.name)
        if any(".mel." in name for name in node.input):
            expected |= {node.name} if node.op_type in QUANTIZED else set()
    whisper = (folder / "config.json").exists()
    assert len(expected) == 2 + 2 + (2 * 2 if whisper else 0)
    inputs = layers(int8)
    assert set(float_nodes(fp32)) == expected
    assert {name for name, (_, weight) in inputs.items() if not is_dequantized(weight)} == expected
    for name, (activation, weight) in inputs.items():
        assert is_dequantized(activation) == is_dequantized(weight) == (name not in expected)


def plain_session(file):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def test_both_graphs_are_the_same_function_but_for_sums_of_convolutions(folder, tmp_path):
    """All but bit for bit: a zero point subtracts behind the division, a Sub before it."""
    model = onnx.load(folder / SIGNED)
    give_unrounded(model.graph, {node.output[0] for node in over_time(model.graph)})
    onnx.save(model, tmp_path / SIGNED)
    signed, unsigned = plain_session(tmp_path / SIGNED), plain_session(folder / UNSIGNED)
    exact = plain_session(folder / "model.onnx")
    for seconds in (0.4, 0.5001, 0.73, 1.0):
        samples = np.stack([voice(900.0, 120.0, seconds, 1), voice(2000.0, 160.0, seconds, 2)])
        one, other, expected = (
            s.run(["logits"], {"samples": samples})[0] for s in (signed, unsigned, exact)
        )
        assert np.abs(one - other).max() < 0.1 * np.abs(one - expected).max()


def test_int8_is_close_to_full_precision_and_not_equal(folder):
    fp32, int8 = (plain_session(folder / name) for name in ("model.onnx", SIGNED))
    for window in windows():
        exact, rounded = (s.run(["embedding"], {"samples": window[None]})[0] for s in (fp32, int8))
        apart = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
        assert 1e-6 < apart < 0.1


def test_halves_are_as_close_to_full_precision_as_what_they_are_made_of(folder, tmp_path):
    for file in folder.glob("model*"):
        shutil.copy(file, tmp_path / file.name)
    assert make_halves(tmp_path, windows(), windows()) == dict.fromkeys(HALVES.values(), 1.0)
    names = ("model.onnx", SIGNED, *HALVES.values())
    sessions = [plain_session(tmp_path / name) for name in names]
    logits = np.array(
        [[s.run(["logits"], {"samples": w[None]})[0] for w in windows()] for s in sessions]
    )
    int8, half, int8_half = np.abs(logits[1:] - logits[0]).max(axis=(1, 2, 3))
    assert 0 < half < 2e-3 * np.abs(logits[0]).max()
    assert int8_half < 3 * int8  # some steps of INT8 flip


def test_the_weights_of_both_lie_once_in_one_file(folder):
    fp32 = (folder / "model.onnx").stat().st_size
    places = {}
    for name in (SIGNED, UNSIGNED):
        graph = onnx.load(folder / name, load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                assert entry["location"] == WEIGHTS
                place = (int(entry["offset"]), int(entry["length"]))
                assert places.setdefault(tensor.name, place) == place
    spans = sorted(places.values())
    ends = [0] + [offset + length for offset, length in spans]
    assert [offset for offset, _ in spans] == ends[:-1]
    assert ends[-1] == (folder / WEIGHTS).stat().st_size < fp32
    assert not list(folder.glob("*.data"))


def test_the_bytes_of_the_file_are_those_of_the_tensors(folder):
    raw = (folder / WEIGHTS).read_bytes()
    inside = {
        t.name: t for t in onnx.load(folder / SIGNED, load_external_data=False).graph.initializer
    }
    for tensor in load(folder, SIGNED).initializer:
        if inside[tensor.name].data_location != TensorProto.EXTERNAL:
            continue
        entry = {
            e.key: int(e.value) for e in inside[tensor.name].external_data if e.key != "location"
        }
        part = raw[entry["offset"] : entry["offset"] + entry["length"]]
        assert part == numpy_helper.to_array(tensor).tobytes()


@pytest.mark.parametrize("name", [SIGNED, UNSIGNED])
def test_properties_and_shapes_survive(folder, name):
    before, after = onnx.load(folder / "model.onnx"), onnx.load(folder / name)
    found = {entry.key: entry.value for entry in after.metadata_props}
    assert {entry.key: found[entry.key] for entry in before.metadata_props} == {
        key: json.dumps(value) for key, value in PROPERTIES.items()
    }
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    kinds = [[n.op_type for n in g.graph.node].count("LayerNormalization") for g in (before, after)]
    assert kinds[0] == kinds[1] > 0


def test_tensors_of_one_name_must_be_equal(tmp_path):
    models = {}
    for file, value in (("a.onnx", 1.0), ("b.onnx", 2.0)):
        tensor = numpy_helper.from_array(np.full(512, value, np.float32), "w")
        models[tmp_path / file] = onnx.helper.make_model(
            onnx.helper.make_graph([], "g", [], [], [tensor])
        )
    with pytest.raises(ValueError, match="two graphs hold different values of w"):
        save_with_shared_weights(models)


@pytest.mark.parametrize("turning", [True, False])
def test_behind_attention_channels_are_turned_centred_and_evened_out_for_nothing(folder, turning):
    model = onnx.load(folder / "graph" / "model.onnx")
    settings = Quantize(turning=turning, gptq=False, bias_correction=False)
    exact, _, _ = quantize(model, windows(), settings)
    weights = {tensor.name for tensor in exact.graph.initializer}
    producers = {output: node for node in exact.graph.node for output in node.output}
    behind = [node for node in exact.graph.node if node.name.endswith("out_proj")]
    for node in behind:
        assert producers[node.input[0]].op_type == "Reshape"
        (added,) = [one for one in exact.graph.node if node.output[0] in one.input]
        assert f"{node.name}_bias" in added.input  # centred
        assert f"{node.input[0]}_even_0" in weights
        assert node.input[1].endswith("_turned") == turning
    assert bool(behind) == any("self_attn" in node.name for node in model.graph.node)


def error_of_weights(exact, int8, name):
    """Sum of squares of what the rounding of a layer's weights changes of its output."""
    (node,) = [node for node in exact.graph.node if node.name == name]
    (rounded,) = [node for node in int8.graph.node if node.name == name]
    scaled = {node.output[0]: node for node in int8.graph.node}[rounded.input[1]]
    integers, scale = (constants(int8.graph)[part] for part in scaled.input[:2])
    change = constants(exact.graph)[node.input[1]] - integers * scale
    moments = second_moments(exact, [node.input[0]], softened(windows()))[node.input[0]]
    return np.trace(change.T @ moments @ change)


def test_weights_of_layers_that_are_given_back_are_rounded_best(folder):
    model = onnx.load(folder / "graph" / "model.onnx")
    given = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in {n.input[1] for n in model.graph.node if n.op_type == "LayerNormalization"}:
        scale = numpy_helper.to_array(given[name]).copy()
        scale[0] *= 30  # loud: all that read it round the weights of others coarsely
        given[name].CopyFrom(numpy_helper.from_array(scale, name))
    _, _, layers = quantize(model, windows(), Quantize(gptq=False, bias_correction=False))
    # All that a normalization feeds, so that no other layer rounds what they read.
    names = [name for name in layers if name.endswith(("fc1", "q_proj", "k_proj", "v_proj"))]
    settings = Quantize(turning=False, bias_correction=False)
    exact, int8, _ = quantize(model, windows(), settings)
    own, back, _ = quantize(model, windows(), settings, names)
    assert bool(names) == any("self_attn" in node.name for node in model.graph.node)
    for name in names:
        assert error_of_weights(own, back, name) < 0.7 * error_of_weights(exact, int8, name)
    assert (int8 == back) == (not names)


def test_graphs_are_left_as_they_are_when_their_weights_are_written(tmp_path):
    tensor = numpy_helper.from_array(np.zeros(1000, np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    before = model.SerializeToString()
    save_with_shared_weights({tmp_path / "a.onnx": model})
    assert (tmp_path / WEIGHTS).stat().st_size == 4000
    assert model.SerializeToString() == before


def test_only_layers_read_what_is_rounded_for_them():
    """A layer reads x, and so does the sum behind it; a convolution's sums are rounded."""
    rng = np.random.default_rng(0)
    constants = {
        "shape": np.array([0, 4, -1]),
        "kernel": rng.normal(size=(4, 4, 3)).astype(np.float32),
        "weight": rng.normal(size=(4, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["raw"]),
        helper.make_node("Conv", ["raw", "kernel"], ["sums"], "conv"),
        helper.make_node("Add", ["sums", "sums"], ["twice"], "behind"),
        helper.make_node("Transpose", ["twice"], ["x"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "weight"], ["y"], "layer"),
        helper.make_node("Add", ["x", "y"], ["logits"], "residual"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "F", 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    int8 = calibrate(model, windows(), [])
    sources = {output: one for one in int8.graph.node for output in one.output}
    reads = {one.name: [sources.get(name) for name in one.input] for one in int8.graph.node}
    assert [one.op_type for one in reads["residual"]] == ["Transpose", "MatMul"]
    assert is_dequantized(reads["layer"][0])
    assert all(map(is_dequantized, (*reads["behind"], *reads["conv"])))


def test_one_window_of_four_is_softer_by_up_to_36_db():
    windows = [np.full(3, 0.5, np.float32) for _ in range(40)]
    found = softened(windows)
    gains_db = [20 * np.log10(one[0] / 0.5) for one in found]
    assert all(gain_db == 0 for place, gain_db in enumerate(gains_db) if place % 4)
    soft = gains_db[::4]
    assert len(set(soft)) == 10
    assert -36 <= min(soft) < -24 < -12 < max(soft) < 0
    assert all(one.dtype == np.float32 for one in found)
    np.testing.assert_array_equal(found[0], softened(windows)[0])


def test_ranges_reach_as_far_as_softened_speech():
    def constant(name, array):
        return numpy_helper.from_array(np.array(array, np.float32), name)

    nodes = [
        helper.make_node("Reshape", ["samples", "shape"], ["frames"]),
        helper.make_node("Abs", ["frames"], ["loud"]),
        helper.make_node("Add", ["loud", "least"], ["above"]),
        helper.make_node("Reciprocal", ["above"], ["read"]),  # the softer, the larger
        helper.make_node("MatMul", ["read", "weight"], ["product"], "first"),
        helper.make_node("Gelu", ["product"], ["inner"]),
        helper.make_node("MatMul", ["inner", "weight"], ["logits"], "last"),
    ]
    shape = numpy_helper.from_array(np.array([0, -1, 4]), "shape")
    constants = [shape, constant("least", 0.01), constant("weight", np.eye(4))]
    taken = helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["N", "T"])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "F", 4])
    graph = helper.make_graph(nodes, "small", [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    heard = [np.full(16, 0.5, np.float32)] * 8
    _, int8, layers = quantize(model, heard, Quantize(smoothing=0, centring=False, gptq=False))
    assert layers == ["first"]
    (node,) = (node for node in int8.graph.node if node.op_type == "QuantizeLinear")
    (scale,) = (t for t in int8.graph.initializer if t.name == node.input[1])
    furthest = max(1 / (window[0] + 0.01) for window in softened(heard))
    assert furthest > 4 / 0.51
    assert 127 * numpy_helper.to_array(scale) == pytest.approx(furthest, rel=0.01)
