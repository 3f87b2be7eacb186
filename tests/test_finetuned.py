import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

from export.errors import RecipeError
from export.finetuned import load_finetuned
from export.graph import check_parity, export_graph
from tests.test_wav2vec2 import SIZES, STABLE

LABELS = {0: "anger", 1: "joy", 2: "calm"}
HEAD = {"classifier_proj_size": 16, "id2label": LABELS}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
FORMS = {
    "wav2vec2": lambda more: Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**SIZES, **HEAD, **more)
    ),
    "xls-r": lambda more: Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**SIZES, **STABLE, **HEAD, **more)
    ),
    "hubert": lambda more: HubertForSequenceClassification(HubertConfig(**SIZES, **HEAD, **more)),
    "wavlm": lambda more: WavLMForSequenceClassification(WavLMConfig(**SIZES, **HEAD, **more)),
    "whisper": lambda more: WhisperForAudioClassification(
        WhisperConfig(**WHISPER, num_hidden_layers=2, **HEAD, **more)
    ),
}


def saved(form, folder, **more):
    torch.manual_seed(0)
    model = FORMS[form](more).eval()
    with torch.no_grad():  # of a new network all norms are 1 and biases 0
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor() if form == "whisper" else Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(folder)
    return model, extractor


def speech(count=12345, seed=1):
    return np.random.default_rng(seed).normal(0.02, 0.1, count).astype(np.float32)


def answer(model, extractor, samples):
    with torch.no_grad():
        return model(**extractor(samples, sampling_rate=16000, return_tensors="pt")).logits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_transformers(tmp_path, form, weighted):
    model, extractor = saved(form, tmp_path, use_weighted_layer_sum=weighted)
    network, labels = load_finetuned(str(tmp_path), 4.0, padded=True)
    assert labels == ("anger", "joy", "calm")
    for seed, count in enumerate((6400, 20000)):
        samples = speech(count, seed)
        with torch.no_grad():
            logits, embedding = network(torch.from_numpy(samples)[None])
        assert embedding.shape == (1, 16)
        expected = answer(model, extractor, samples)
        assert expected.std() > 0.03
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_whisper_without_padding_hears_the_window_alone(tmp_path):
    model, _ = saved("whisper", tmp_path)
    network, _ = load_finetuned(str(tmp_path), 4.0, padded=False)
    samples = speech(2 * 16000)
    with torch.no_grad():
        logits, _ = network(torch.from_numpy(samples)[None])
        # What transformers would say if it were built for 2 s.
        model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(
            model.encoder.embed_positions.weight[:100]
        )
        model.encoder.max_source_positions = model.config.max_source_positions = 100
        short = WhisperFeatureExtractor(chunk_length=2)
        expected = answer(model, short, samples)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["wavlm", "whisper"])
def test_the_graph_is_that_of_torch(tmp_path, form):
    saved(form, tmp_path, use_weighted_layer_sum=True)
    network, _ = load_finetuned(str(tmp_path), 4.0, padded=False)
    export_graph(network, {}, 16000, tmp_path / "model.onnx")
    windows = [speech(count) for count in (6400, 16000, 40001)]
    assert check_parity(network, tmp_path / "model.onnx", windows) < 1e-4


def refused(folder):
    with pytest.raises(RecipeError) as fault:
        load_finetuned(str(folder), 4.0, padded=True)
    (line,) = str(fault.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("form", "name"),
    [("hubert", "classifier.weight"), ("whisper", "projector.bias"), ("wavlm", "layer_weights")],
)
def test_no_head_is_made_up(tmp_path, form, name):
    saved(form, tmp_path, use_weighted_layer_sum=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"missing tensors ['{name}'], unexpected []" in refused(tmp_path)


def test_another_form_is_refused(tmp_path):
    Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES)).save_pretrained(tmp_path)
    assert refused(tmp_path) == (
        f"checkpoint '{tmp_path}' is a Wav2Vec2ForCTC; allowed are "
        "Wav2Vec2ForSequenceClassification, HubertForSequenceClassification, "
        "WavLMForSequenceClassification, WhisperForAudioClassification"
    )


def test_another_rate_is_refused(tmp_path):
    saved("hubert", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sampling_rate": 8000}))
    assert refused(tmp_path) == f"checkpoint '{tmp_path}' hears 8000 Hz; allowed is 16000"
