import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import (
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    WavLMConfig,
    WavLMModel,
)

from export.encoders import encode_states, load_encoder
from export.encoders.wav2vec2 import load_wav2vec2, normalised
from export.errors import RecipeError
from export.graph import check_parity, export_graph
from export.heads import CnnHead
from export.model import Classifier
from export.recipe import EncoderChoice

RATE_HZ = 16000
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 8,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "vocab_size": 5,
}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
KINDS = {
    "wav2vec2": lambda: Wav2Vec2ForPreTraining(Wav2Vec2Config(**SIZES)),
    "xls-r": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **STABLE)),
    "hubert": lambda: HubertForSequenceClassification(HubertConfig(**SIZES)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SIZES)),
}
"""Every kind, and every head that a checkpoint may have beside the encoder, or none."""


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(kind, folder):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():  # of a new network all norms are 1 and biases 0
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


def speech(count=12345, rows=1, level=0.1):
    torch.manual_seed(1)
    return level * torch.randn(rows, count) + 0.02


@pytest.mark.parametrize(("layers", "states"), [(3, 4), (3, 1), (2, 3), (1, 1)])
def test_hidden_states_are_those_of_transformers(checkpoint, layers, states):
    folder, model = checkpoint
    inner = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        whole = inner(normalised(speech(rows=2)), output_hidden_states=True)
        found = load_wav2vec2(str(folder), None, layers, states)(speech(rows=2))
    states_of = [*whole.hidden_states[:-1], whole.last_hidden_state]
    even = states_of[0].shape[1] // 2 * 2
    pairs = [state[:, :even].unflatten(1, (-1, 2)).mean(dim=2) for state in states_of]
    expected = torch.stack(pairs[layers + 1 - states : layers + 1], dim=1)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_windows_are_normalised_as_by_the_extractor(tmp_path):
    samples = speech()
    made = Wav2Vec2FeatureExtractor(do_normalize=True)(samples[0].numpy(), sampling_rate=RATE_HZ)
    np.testing.assert_allclose(normalised(samples)[0], made.input_values[0], atol=1e-5)


@pytest.mark.parametrize(("extractor", "expected"), [(None, True), (True, True), (False, False)])
def test_windows_are_normalised_if_the_checkpoint_asks_for_it(tmp_path, extractor, expected):
    saved("wav2vec2", tmp_path)
    if extractor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": extractor}))
    encoder = load_wav2vec2(str(tmp_path), None, 1, 1)
    with torch.no_grad():
        same = torch.allclose(encoder(speech()), encoder(0.1 * speech() - 1), atol=1e-3)
    assert same == expected


def test_weight_normalization_is_merged(checkpoint):
    encoder = load_wav2vec2(str(checkpoint[0]), None, 1, 1)
    assert not any(parametrize.is_parametrized(module) for module in encoder.modules())


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm"])
def test_the_graph_is_that_of_torch_at_every_length(tmp_path, kind):
    folder, _ = saved(kind, tmp_path)
    choice = EncoderChoice("wav2vec2", 2, folder.name, states=2)
    encoder = load_encoder(choice, folder.parent, 4.0)
    torch.manual_seed(0)
    model = Classifier(encoder, CnnHead(2, encoder.dim, 4, width=8)).eval()
    export_graph(model, {}, RATE_HZ, tmp_path / "model.onnx")
    windows = [speech(count)[0].numpy() for count in (6400, 16000, 40001)]
    assert check_parity(model, tmp_path / "model.onnx", windows) < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    weighty = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    computed = [n.name for n in weighty if n.input[1] not in constants]
    assert len(computed) == 2 * choice.layers  # the two products of each attention
    names = [node.name for node in weighty]
    assert len(set(names)) == len(names)
    assert {
        "encoder.model.feature_extractor.conv_layers.6.conv",
        "encoder.model.encoder.layers.1.attention.found.q_proj"
        if kind == "wavlm"
        else "encoder.model.encoder.layers.1.attention.q_proj",
    } <= set(names)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    both = np.concatenate([windows[1][None], -windows[1][None]])
    alone = [session.run(["logits"], {"samples": row[None]})[0][0] for row in both]
    np.testing.assert_allclose(session.run(["logits"], {"samples": both})[0], alone, atol=1e-5)


def test_states_are_cached_in_half_precision(tmp_path):
    folder, _ = saved("hubert", tmp_path)
    choice = EncoderChoice("wav2vec2", 2, folder.name, states=2)
    found = encode_states(choice, folder.parent, 1.0, tuned=0)(speech()[0].numpy())["states"]
    assert found.dtype == np.float16
    assert found.shape == (2, 19, 32)  # 38 frames of the convolutions, in pairs


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder):
    with pytest.raises(RecipeError) as fault:
        load_wav2vec2(str(folder), None, 2, 1)
    (line,) = str(fault.value).splitlines()
    return line


def test_no_tensor_is_made_up(tmp_path):
    folder, _ = saved("wav2vec2", tmp_path)
    changed(folder, lambda t: t.pop("wav2vec2.encoder.layers.2.attention.k_proj.weight"))
    assert refused(folder) == (
        f"{folder}: missing tensors ['encoder.layers.2.attention.k_proj.weight'], unexpected []; "
        "the checkpoint of such a network is needed"
    )


def test_no_tensor_is_left_over(tmp_path):
    folder, _ = saved("wav2vec2", tmp_path)
    changed(folder, lambda t: t.update({"wav2vec2.encoder.adapter": torch.zeros(1)}))
    assert "missing tensors [], unexpected ['encoder.adapter']" in refused(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder, _ = saved("wav2vec2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    assert refused(folder).endswith(
        "intermediate_dense.weight has the shape (64, 32), its config asks for (65, 32)"
    )


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    line = f"checkpoint '{tmp_path}' is a 'bert'; allowed are wav2vec2, hubert, wavlm"
    assert refused(tmp_path) == line


@pytest.mark.parametrize("form", ["old names", "torch", "parts", "half"])
def test_every_form_that_checkpoints_have_is_read(tmp_path, form):
    folder, model = saved("wav2vec2", tmp_path / "as it is")
    expected = load_wav2vec2(str(folder), None, 3, 1)(speech())
    tensors = load_file(folder / "model.safetensors")
    if form == "parts":
        model.save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif form == "half":
        changed(folder, lambda t: t.update({name: value.half() for name, value in t.items()}))
    else:
        convolution = "wav2vec2.encoder.pos_conv_embed.conv"
        now = f"{convolution}.parametrizations.weight.original"
        before = {f"{now}{i}": f"{convolution}.weight_{letter}" for i, letter in enumerate("gv")}
        old = {before.get(name, name): value for name, value in tensors.items()}
        assert f"{convolution}.weight_g" in old
        (folder / "model.safetensors").unlink()
        if form == "torch":
            torch.save(old, folder / "pytorch_model.bin")
        else:
            save_file(old, folder / "model.safetensors")
    found = load_wav2vec2(str(folder), None, 3, 1)(speech())
    assert torch.allclose(found, expected, atol=1e-2 if form == "half" else 0, rtol=0)


@pytest.mark.parametrize(
    ("layers", "states", "line"),
    [
        (4, 1, "layers = 4: this encoder has 1 to 3 layers"),
        (0, 1, "layers = 0: this encoder has 1 to 3 layers"),
        (2, 4, "states = 4: 2 layers have 1 to 3 states"),
    ],
)
def test_layers_and_states_that_there_are_not_are_refused(tmp_path, layers, states, line):
    folder, _ = saved("hubert", tmp_path)
    with pytest.raises(RecipeError, match=line):
        load_wav2vec2(str(folder), None, layers, states)
