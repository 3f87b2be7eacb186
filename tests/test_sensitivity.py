import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from scipy.stats import entropy

from export.encoders.mel import MelEncoder
from export.encoders.whisper import WhisperStem
from export.graph import export_graph
from export.heads import CnnHead
from export.model import Classifier
from export.qdq import QUANTIZED, as_float, float_nodes, unsigned
from export.quantize import quantize
from export.recipe import Quantize
from export.sensitivity import divergence, front, least_float, logits_of, walk
from tests.speech_corpus import voice

PROPERTIES = {"labels": ["a", "b", "c"], "sample_rate_hz": 16000, "schema_version": 1}
WINDOWS = [voice(500.0 * (n + 1), 100.0 + 10 * n, 0.5 + 0.07 * n, n) for n in range(5)]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Full precision, its Q/DQ graph and the quantized layers; one layer is rounded very badly."""
    file = tmp_path_factory.mktemp("graph") / "model.onnx"
    torch.manual_seed(0)
    encoder = MelEncoder(WhisperStem(16, 8), 16, 2)
    model = Classifier(encoder, CnnHead(encoder.states, encoder.dim, 3, width=8)).eval()
    export_graph(model, PROPERTIES, 16000, file)
    exact, int8, layers = quantize(onnx.load(file), WINDOWS, Quantize())
    return exact, worsened(int8, layers[3]), layers


def worsened(int8, layer):
    """Return a copy in which what a layer reads has a sixteenth of the steps."""
    model = copy.deepcopy(int8)
    sources = {output: node for node in model.graph.node for output in node.output}
    (node,) = [node for node in model.graph.node if node.name == layer]
    name = sources[node.input[0]].input[1]
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(16), name))
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


def test_as_few_layers_as_hold_the_bound_are_given_back(graphs):
    exact, int8, layers = graphs
    worst = list(walk(exact, int8, layers, WINDOWS))[:3]
    left = [
        divergence(
            logits_of(exact, WINDOWS),
            logits_of(unsigned(as_float(int8, exact, worst[:count])), WINDOWS),
        )
        for count in range(4)
    ]
    assert left[1] < left[0] / 2
    for bound, count in ((1.0, 0), (left[1] * 1.001, 1), (0.0, 3)):
        kept, found = least_float(exact, int8, worst, WINDOWS, equal=0.0, most_apart=bound)
        assert kept == worst[:count]
        assert found["divergence"] == pytest.approx(left[count])
    assert least_float(exact, int8, worst, WINDOWS, equal=1.01, most_apart=1.0)[0] == worst


def test_the_front_goes_from_all_int8_to_full_precision(graphs):
    exact, int8, layers = graphs
    order = list(walk(exact, int8, layers, WINDOWS))
    rows = front(exact, int8, order, WINDOWS)
    assert [row["float_layers"] for row in rows] == [0, 1, 2, 4, 8, len(layers)]
    assert rows[-1]["mb"] == exact.ByteSize() / 1e6
    assert rows[1]["mb"] == unsigned(as_float(int8, exact, order[:1])).ByteSize() / 1e6
    assert rows[-1]["divergence"] == 0
    assert rows[-1]["time"] == 1
    assert rows[1]["divergence"] < rows[0]["divergence"]


def test_why_a_node_stays_float_is_said(graphs):
    exact, _, layers = graphs
    reasons = float_nodes(exact.graph)
    assert set(reasons.values()) == {"front end", "gives the logits"}
    assert not set(reasons) & set(layers)
