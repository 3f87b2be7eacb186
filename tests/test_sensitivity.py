import copy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from scipy.stats import entropy

from export.encoders.mel import MelEncoder
from export.encoders.whisper import WhisperStem
from export.graph import export_graph
from export.heads import CnnHead
from export.model import Classifier
from export.probe import tensor_values
from export.qdq import (
    QUANTIZED,
    as_float,
    bias_and_output,
    float_nodes,
    unsigned,
    with_float_sums,
)
from export.quantize import quantize, quantize_within, softened
from export.recipe import Quantize
from export.sensitivity import (
    FRONT,
    apart,
    divergence,
    front,
    logits_of,
    order_to_give_back,
    walk,
)
from export.twice import x86_form
from tests.speech_corpus import voice

PROPERTIES = {"labels": ["a", "b", "c"], "sample_rate_hz": 16000, "schema_version": 1}
WINDOWS = [voice(500.0 * (n + 1), 100.0 + 10 * n, 0.5 + 0.07 * n, n) for n in range(5)]


UNEVEN = Quantize(smoothing=0, divergence=0.0)


def classifier(loud=1.0):
    """A network; the first convolution of its head reads one channel so much louder."""
    torch.manual_seed(0)
    encoder = MelEncoder(WhisperStem(16, 8), 16, 2)
    model = Classifier(encoder, CnnHead(encoder.states, encoder.dim, 3, width=8)).eval()
    block = model.head.members[0].blocks[0]
    with torch.no_grad():
        block.norm.weight[0] *= loud
        block.norm.bias[0] *= loud
        block.conv.weight[:, 0] /= loud
        # Else all windows had one label.
        logits = torch.cat([model(torch.from_numpy(window)[None])[0] for window in WINDOWS])
        model.head.members[0].classify.bias -= logits.mean(dim=0)
    return model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Full precision, its Q/DQ graph and the quantized layers; one layer is rounded very badly."""
    file = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_graph(classifier(), PROPERTIES, 16000, file)
    exact, int8, layers = quantize(onnx.load(file), WINDOWS, Quantize())
    return exact, worsened(int8, layers[3]), layers


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A graph, one layer of which is rounded very badly where nothing is evened out; its name."""
    file = tmp_path_factory.mktemp("loud") / "model.onnx"
    export_graph(classifier(300.0), PROPERTIES, 16000, file)
    exact, int8, layers = quantize(onnx.load(file), WINDOWS, UNEVEN)
    alone = walk(exact, int8, layers, WINDOWS)
    return onnx.load(file), order_to_give_back(int8, alone), alone


def worsened(int8, layer, times=16):
    """Return a copy in which the steps of what a layer reads are so many times as wide."""
    model = copy.deepcopy(int8)
    sources = {output: node for node in model.graph.node for output in node.output}
    (node,) = [node for node in model.graph.node if node.name == layer]
    name = sources[node.input[0]].input[1]
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(times), name))
    return model


def test_divergence_is_that_of_scipy():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7, 4)).astype(np.float32)
    probs = [np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (one, other)]
    assert divergence(one, other) == pytest.approx(entropy(*probs, axis=1).mean(), rel=1e-5)
    assert divergence(one, one + 3) == pytest.approx(0, abs=1e-6)


def test_without_any_int8_layer_a_graph_is_full_precision(graphs):
    exact, int8, layers = graphs
    whole = as_float(int8, exact, layers)
    assert not [node for node in whole.graph.node if node.op_type.endswith("Linear")]
    np.testing.assert_allclose(logits_of(whole, WINDOWS), logits_of(exact, WINDOWS), atol=1e-5)
    onnx.checker.check_model(whole, full_check=True)


def test_with_all_int8_layers_a_graph_is_unchanged(graphs):
    exact, int8, _ = graphs
    np.testing.assert_array_equal(
        logits_of(as_float(int8, exact, []), WINDOWS), logits_of(int8, WINDOWS)
    )


def test_a_float_layer_reads_and_gives_no_rounded_tensor(graphs):
    exact, int8, layers = graphs
    for layer in layers:
        model = as_float(int8, exact, [layer])
        sources = {output: node for node in model.graph.node for output in node.output}
        for node in model.graph.node:
            if node.op_type in QUANTIZED:
                weight = sources.get(node.input[1])
                rounded = weight is not None and weight.op_type == "DequantizeLinear"
                assert rounded == (node.name in layers and node.name != layer)
            if node.op_type == "QuantizeLinear" and node.input[0] in sources:
                reader = [n for n in model.graph.node if set(n.input) & set(node.output)]
                assert reader  # nothing is rounded for nobody
        onnx.checker.check_model(model, full_check=True)


def test_a_layer_with_float_sums_keeps_its_int8_weights_only(graphs):
    exact, int8, layers = graphs
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    model = copy.deepcopy(exact)
    there = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {output: node for node in int8.graph.node for output in node.output}
    rounded = {node.name: node for node in int8.graph.node}
    for node in exact.graph.node:
        if node.name not in layers:
            continue
        weight, scale = (constants[name] for name in sources[rounded[node.name].input[1]].input[:2])
        widened = weight * (scale if node.op_type == "MatMul" else np.expand_dims(scale, (1, 2)))
        bias = bias_and_output(int8.graph, rounded[node.name], there)[0]
        for name, array in ((node.input[1], widened.astype(np.float32)), (bias, constants[bias])):
            there[name].CopyFrom(numpy_helper.from_array(array, name))
    floats = with_float_sums(int8, layers)
    assert not [node for node in floats.graph.node if node.op_type == "QuantizeLinear"]
    for graph in (floats, unsigned(floats)):
        onnx.checker.check_model(graph, full_check=True)
        np.testing.assert_allclose(logits_of(graph, WINDOWS), logits_of(model, WINDOWS), atol=1e-4)
        kinds = [tensor.data_type for tensor in graph.graph.initializer]
        assert kinds.count(onnx.TensorProto.INT8) >= len(layers)
    assert floats.ByteSize() < int8.ByteSize()
    one, other = (plain_logits(graph) for graph in (floats, unsigned(floats)))
    np.testing.assert_array_equal(one, other)


def plain_logits(model):
    """Return the logits of a window as the nodes give them, without any optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(["logits"], {"samples": WINDOWS[0][None]})[0]


def test_other_layers_still_multiply_int8(graphs):
    _, int8, layers = graphs
    model = unsigned(with_float_sums(int8, layers[:1]))
    sources = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name in layers:
            expected = {"DequantizeLinear"} if node.name != layers[0] else {"Mul"}
            assert {sources[node.input[1]]} == expected
            assert (sources[node.input[0]] == "DequantizeLinear") == (node.name != layers[0])


def test_dear_layers_with_few_weights_are_given_back_first(graphs):
    _, int8, layers = graphs
    sources = {output: node for node in int8.graph.node for output in node.output}
    sizes = {tensor.name: np.prod(tensor.dims) for tensor in int8.graph.initializer}
    weights = {
        node.name: sizes[sources[node.input[1]].input[0]]
        for node in int8.graph.node
        if node.name in layers
    }
    small, big = min(weights, key=weights.get), max(weights, key=weights.get)
    others = [layer for layer in layers if layer not in (small, big)]
    alone = {big: 1.1, small: 1.0} | {layer: 0.1 / (1 + n) for n, layer in enumerate(others)}
    assert order_to_give_back(int8, alone) == [small, big, *others]
    alone[big] = 1.0 * weights[big] / weights[small] * 1.01
    assert order_to_give_back(int8, alone)[0] == big


def test_the_layer_that_is_rounded_badly_comes_first(graphs):
    exact, int8, layers = graphs
    found = walk(exact, int8, layers, WINDOWS)
    assert sorted(found) == sorted(layers)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert next(iter(found)) == layers[3]
    alone = unsigned(as_float(int8, exact, [name for name in layers if name != layers[3]]))
    expected = divergence(logits_of(exact, WINDOWS), logits_of(alone, WINDOWS))
    assert found[layers[3]] == pytest.approx(expected)
    assert found[layers[3]] > 2 * list(found.values())[1]


def test_as_few_layers_as_hold_the_bound_are_given_back(loud):
    model, order, alone = loud
    expected = logits_of(model, WINDOWS)
    assert "conv" in order[0] and alone[order[0]] > 10 * alone[order[1]]

    def within(bound, most=5):
        settings = replace(UNEVEN, divergence=bound, most_float=most, labels_equal=0.0)
        made = quantize_within(model, WINDOWS, WINDOWS, settings)
        each = [
            apart(expected, logits_of(form(made.int8, made.given_back), WINDOWS))
            for form in (with_float_sums, x86_form)
        ]
        labels, divergences = ([one[key] for one in each] for key in made.left)
        assert made.left == {"labels_equal": min(labels), "divergence": max(divergences)}
        return made, divergences

    (none, divergences), (all_five, _) = within(1.0), within(0.0)
    assert (none.given_back, none.int8 == none.plain) == ([], True)
    assert (all_five.given_back, all_five.alone) == (order[:5], alone)
    assert within(0.0, most=0)[0].given_back == []
    assert within(none.left["divergence"] / 2)[0].given_back == order[:1]
    # One of the forms is below this and the other above.
    assert min(divergences) < max(divergences)
    assert within(sum(divergences) / 2)[0].given_back != []


def test_labels_must_stay_whatever_the_divergence(loud):
    model, order, _ = loud
    labels = logits_of(model, WINDOWS).argmax(axis=1)
    none = quantize(model, WINDOWS, UNEVEN)[1]
    assert (logits_of(unsigned(none), WINDOWS).argmax(axis=1) != labels).any()
    for equal, expected in ((0.0, []), (1.0, order[:1])):
        settings = replace(UNEVEN, divergence=1e9, labels_equal=equal)
        assert quantize_within(model, WINDOWS, WINDOWS, settings).given_back == expected


def test_a_layer_that_is_given_back_is_not_off_on_average(loud):
    model, _, _ = loud
    made = quantize_within(model, WINDOWS, WINDOWS, replace(UNEVEN, most_float=1))
    (name,) = made.given_back
    (node,) = [node for node in made.exact.graph.node if node.name == name]

    def mean(model):
        values = tensor_values(model, [node.output[0]], softened(WINDOWS))
        return np.concatenate([value[node.output[0]] for value in values], axis=2).mean(axis=(0, 2))

    left, before = (
        np.abs(mean(x86_form(one, [name])) - mean(made.exact)).max()
        for one in (made.int8, made.plain)
    )
    assert left < 0.1 * before


def test_the_front_goes_from_all_int8_to_full_precision(graphs):
    exact, int8, layers = graphs
    order = list(walk(exact, int8, layers, WINDOWS))
    graphs = [(count, x86_form(int8, order[:count])) for count in FRONT]
    rows = front([*graphs, (len(layers), exact)], WINDOWS)
    assert [row["float_layers"] for row in rows] == [0, 1, 2, 4, 8, len(layers)]
    assert rows[-1]["mb"] == exact.ByteSize() / 1e6
    assert rows[1]["mb"] == x86_form(int8, order[:1]).ByteSize() / 1e6
    assert rows[-1]["divergence"] == 0
    assert rows[-1]["time"] == 1
    assert rows[1]["divergence"] < rows[0]["divergence"]


def test_why_a_node_stays_float_is_said(graphs):
    exact, _, layers = graphs
    reasons = float_nodes(exact.graph)
    assert set(reasons.values()) == {"front end", "gives the logits"}
    assert not set(reasons) & set(layers)
