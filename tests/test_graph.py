import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.encoders.mel import MelEncoder
from export.encoders.wav import WavEncoder
from export.encoders.whisper import WhisperStem, load_whisper
from export.errors import CertificateError
from export.graph import OPSET, PARITY, check_parity, export_graph
from export.heads import CnnHead
from export.model import Classifier
from tests.speech_corpus import make_whisper, voice

PROPERTIES = {"labels": ["a", "ä", "c"], "sample_rate_hz": 16000, "schema_version": 1}


def whisper(folder):
    make_whisper(folder)
    return load_whisper(str(folder), 2, 2.0, 3)


def mel(_):
    return MelEncoder(WhisperStem(16, 8), 16, 2)


def wav(_):
    return WavEncoder(32, 1)


@pytest.fixture(scope="module", params=[whisper, mel, wav], ids=["whisper", "mel", "wav"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    torch.manual_seed(0)
    encoder = request.param(folder)
    head = CnnHead(encoder.states, encoder.dim, 3, width=8)
    torch.nn.init.normal_(head.members[0].weights)
    model = Classifier(encoder, head).eval()
    export_graph(model, PROPERTIES, 16000, folder / "model.onnx")
    return model, folder / "model.onnx"


def run(file, samples):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["logits", "embedding"], {"samples": samples})


@pytest.mark.parametrize("seconds", [0.4, 0.403, 0.7777, 1.0, 1.31, 2.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_answers_as_torch_does(exported, seconds, batch):
    model, file = exported
    samples = np.stack([voice(900.0 * (row + 1), 130.0, seconds, row) for row in range(batch)])
    with torch.no_grad():
        expected = model(torch.from_numpy(samples))
    for found, wanted in zip(run(file, samples), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_soft_speech_is_answered_as_by_torch(exported):
    model, file = exported
    samples = voice(900.0, 130.0, 1.0, 0)[None] * np.float32(10 ** (-60 / 20))
    with torch.no_grad():
        expected = model(torch.from_numpy(samples))
    for found, wanted in zip(run(file, samples), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("gain_db", [-40, 0, 20])
def test_clips_of_a_batch_are_answered_as_alone(exported, gain_db):
    _, file = exported
    samples = np.stack([voice(hz, 130.0, 0.8, 0) for hz in (500.0, 1000.0, 3000.0)])
    samples[1] *= np.float32(10 ** (gain_db / 20))
    together = run(file, samples)
    for row in range(3):
        for whole, alone in zip(together, run(file, samples[row : row + 1]), strict=True):
            np.testing.assert_allclose(whole[row], alone[0], atol=1e-4)


def test_inputs_and_outputs_are_those_of_a_bundle(exported):
    model, file = exported
    graph = onnx.load(file).graph

    def sizes(values):
        return {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in values
        }

    assert sizes(graph.input) == {"samples": ["N", "T"]}
    width = model.head.embedding_dim
    assert sizes(graph.output) == {"logits": ["N", 3], "embedding": ["N", width]}


def test_opset_properties_and_layer_normalization(exported):
    model, file = exported
    proto = onnx.load(file)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET == 20
    props = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert props == PROPERTIES
    norms = sum(isinstance(part, torch.nn.LayerNorm) for part in model.modules())
    nodes = [node.op_type for node in proto.graph.node]
    # The head normalises hidden states by a function, which may be one node for all, and what the
    # probe sees of each.
    seen = model.encoder.states
    assert norms + seen < nodes.count("LayerNormalization") <= norms + 2 * seen
    # Two means of each state are what the probe sees; two of each norm would be too many.
    assert nodes.count("ReduceMean") - 2 * seen < norms
    assert not {"STFT", "DFT"} & set(nodes)


def test_parity_is_measured_at_three_levels(exported):
    model, file = exported
    windows = [voice(800.0, 110.0, seconds, 0) for seconds in (0.5, 1.2)]
    worst = check_parity(model, file, windows)
    assert 0 <= worst < PARITY == 1e-4


def test_another_network_is_refused(exported):
    model, file = exported
    before = model.head.probe.bias.data.clone()
    try:
        model.head.probe.bias.data[1] += 0.25
        with pytest.raises(CertificateError) as fault:
            check_parity(model, file, [voice(800.0, 110.0, 0.5, 0)])
    finally:
        model.head.probe.bias.data = before
    assert str(fault.value) == (
        "model.onnx differs from torch by 2.5e-01 in a logit; allowed is below 0.0001"
    )


def test_nan_is_refused(exported):
    model, file = exported
    with pytest.raises(CertificateError, match="differs from torch by nan"):
        check_parity(model, file, [np.full(8000, np.nan, np.float32)])
