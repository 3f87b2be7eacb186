"""The other way to a graph: optimum-onnx exports a checkpoint, and ``quantize`` takes the file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.adopt import adopt
from export.encoders.wav2vec2 import normalised
from export.finetuned import load_finetuned
from export.graph import export_graph
from export.qdq import QUANTIZED, float_nodes
from tests.speech_corpus import voice
from tests.test_finetuned import LABELS, saved

optimum = pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")

WINDOWS = [voice(900.0, 120.0, 0.5 + 0.3 * n, n)[None] for n in range(3)]


def logits(file, name, samples):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {name: samples})[0]


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_graph_of_optimum_answers_as_ours_does(tmp_path):
    saved("wav2vec2", tmp_path / "mine")
    optimum.main_export(
        str(tmp_path / "mine"), tmp_path / "theirs", task="audio-classification", opset=17,
        do_validation=False,
    )  # fmt: skip
    network, _ = load_finetuned(str(tmp_path / "mine"), 2.0, True)
    export_graph(network, {}, 16000, tmp_path / "ours.onnx")
    theirs = tmp_path / "theirs" / "model.onnx"
    for samples in WINDOWS:
        heard = normalised(torch.from_numpy(samples)).numpy()  # theirs expects this of its caller
        expected = logits(theirs, "input_values", heard)
        assert np.ptp(expected) > 1e-3
        np.testing.assert_allclose(
            logits(tmp_path / "ours.onnx", "samples", samples), expected, atol=1e-5
        )
    adopt(theirs, list(LABELS.values()), {}, tmp_path / "adopted.onnx")
    np.testing.assert_array_equal(logits(tmp_path / "adopted.onnx", "samples", heard), expected)
    layers = []
    for file in ("adopted.onnx", "ours.onnx"):
        graph = onnx.load(tmp_path / file).graph
        nodes = [node.name for node in graph.node if node.op_type in QUANTIZED]
        layers.append(len(set(nodes) - set(float_nodes(graph))))
    assert layers[0] == layers[1] > 10
