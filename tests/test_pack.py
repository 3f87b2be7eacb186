import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edge_ser import Recognizer, audio
from edge_ser.adaptation import FEATURES, Adaptation
from edge_ser.bundle import ADAPTATION, Bundle, sha256
from edge_ser.cli import main
from edge_ser.samples import sample_paths
from edge_ser.testing import make_bundle as make_plain_bundle
from export.card import model_card
from export.half import HALVES
from export.pack import TOOLS, describe, make_bundle, tool_versions, write_selftest
from export.recipe import Data, EncoderChoice, Recipe, Train, Windows
from export.speech import Speech
from tests.speech_corpus import LABELS, make_corpora


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.05, "unit": "clip"}


def system(offset):
    rows = {
        "nemo": {
            "clips": 12,
            "speakers": ["nemo/A", "nemo/B"],
            "masked": {"ua": interval(0.8 - offset)},
        },
        "urdu": {"clips": 3, "speakers": ["urdu/1"], "masked": {"ua": interval(0.5 - offset)}},
    }
    return {"corpora": rows, "pooled": {"clips": 15, "ua": interval(0.7 - offset)}}


CERTIFICATE = {
    "systems": {"fp32": system(0.0), "int8": system(0.3), "int8_x86": system(0.01)},
    "gate": {"int8_x86": {"labels_equal": 0.98765, "ua_kept": 0.99123}},
    "adapted": [{"history": "balanced", "utterances": 20, "pooled_ua": 0.7654}],
    "nonspeech": {"minutes": 10, "uncertain": 0.9642},
    "conditions": [
        {
            "condition": "7 s",
            "clips": 9,
            "labels_equal": 0.8889,
            "kl": 0.0123,
            "ua": {"fp32": 0.7, "int8": 0.6},
        }
    ],
    "quantization": {
        "float_nodes": {"a": "front end", "b": "front end", "c": "alone 2.0e-03 nats"},
        "given_back": ["c"],
    },
    "seed": 7,
}
STEMS = ("model", "model_fp16", "model_int8", "model_int8_fp16", "model_int8_x86")
NETWORK = Adaptation(np.ones((FEATURES + 1, 1)), np.ones((2, 1)), np.ones(1), half=4.0)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Return a folder with graphs of known answers, and the metadata that goes with them."""
    folder = tmp_path_factory.mktemp("graphs")
    metadata = Bundle.open(make_plain_bundle(folder, labels=LABELS, fp32=True)).metadata
    for file in folder.iterdir():
        if not file.name.startswith("model"):
            file.unlink()
    for source, half in HALVES.items():  # what is in them, packing does not ask
        shutil.copyfile(folder / source, folder / half)
    corpora = ({"name": "nemo", "language": "pl", "licence": "CC", "source": "Someone 2024"},)
    return folder, replace(metadata, name="small", corpora=corpora, files={})


@pytest.fixture(scope="module")
def bundle(graphs, tmp_path_factory):
    folder, metadata = graphs
    certificate = tmp_path_factory.mktemp("certify")
    (certificate / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (certificate / "certificate.png").write_bytes(b"a picture")
    (certificate / "stage.json").write_text("{}")
    made = tmp_path_factory.mktemp("made") / "bundle"
    made.mkdir()
    (made / "stage.json").write_text("{}")  # a stage's folder holds its key
    (certificate / ADAPTATION).write_text(json.dumps(NETWORK.to_json()))
    make_bundle(metadata, folder, certificate, certificate / ADAPTATION, made)
    return made


def test_a_bundle_holds_what_the_runtime_needs_and_nothing_else(bundle):
    assert sorted(Bundle.open(bundle).metadata.files) == sorted(
        file.name for file in bundle.iterdir() if file.name not in ("metadata.json", "stage.json")
    )
    assert sorted(file.name for file in bundle.iterdir() if file.name != "stage.json") == [
        "README.md",
        "adaptation.json",
        "certificate.json",
        "certificate.png",
        "metadata.json",
        "model.onnx",
        "model_fp16.onnx",
        "model_int8.bin",
        "model_int8.onnx",
        "model_int8_fp16.onnx",
        "model_int8_x86.onnx",
        "selftest.npz",
    ]
    files = Bundle.open(bundle).metadata.files
    for name, entry in files.items():
        assert entry.sha256 == sha256(bundle / name)
        optional = ("model.onnx", "model_fp16.onnx", "model_int8_fp16.onnx", "adaptation.json")
        assert entry.required == (name not in optional)
    assert len(files) == 11


def test_it_opens_without_what_is_optional(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    for name, entry in Bundle.open(bundle).metadata.files.items():
        if not entry.required:
            (tmp_path / name).unlink()
    assert tuple(Recognizer.load(tmp_path).predict(sample_paths()[0]).probs) == LABELS


def test_a_recognizer_opens_it_and_answers(bundle, graphs):
    recognizer = Recognizer.load(bundle)
    prediction = recognizer.predict(sample_paths()[0])
    assert tuple(prediction.probs) == LABELS
    assert recognizer.metadata.name == "small"
    assert recognizer.adapt().predict(sample_paths()[0]) == prediction
    assert (
        Recognizer.load(bundle, precision="fp32").predict(sample_paths()[0]).graph == "model.onnx"
    )


def test_verify_passes_and_finds_a_changed_byte(bundle, tmp_path):
    command = [sys.executable, "-m", "edge_ser", "verify", "--json", "--bundle", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert [check["check"] for check in checks] == [
        "hashes",
        "labels int8",
        "self-test int8",
        "labels fp32",
        "self-test fp32",
    ]
    assert all(check["ok"] for check in checks)


def test_verify_fails_if_the_recorded_logits_are_of_another_graph(bundle, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in bundle.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with np.load(other / "selftest.npz") as recorded:
        arrays = {name: recorded[name] + name.startswith("model") for name in recorded.files}
    np.savez(other / "selftest.npz", **arrays)
    metadata = json.loads((other / "metadata.json").read_text())
    metadata["files"]["selftest.npz"]["sha256"] = sha256(other / "selftest.npz")
    (other / "metadata.json").write_text(json.dumps(metadata))
    assert main(["verify", "--bundle", str(other)]) == 1


@pytest.mark.parametrize(
    ("window_s", "lengths_s"), [(4.0, (0.5, 1.5, 3.0)), (3.0, (0.5, 1.5, 3.0)), (1.0, (0.5, 1.0))]
)
def test_the_selftest_records_every_graph_within_the_window(graphs, tmp_path, window_s, lengths_s):
    folder, _ = graphs
    sample = sample_paths()[1]
    write_selftest(folder, sample, 16000, window_s, tmp_path / "s.npz")
    whole = audio.read(sample, rate_hz=16000)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as found:
        assert len(found.files) == len(lengths_s) * (1 + 5)
        for i, seconds in enumerate(lengths_s):
            part = found[f"samples_{i}"]
            np.testing.assert_array_equal(part, whole[: round(16000 * seconds)])
            magnitude = np.abs(part).mean()
            expected = [8 * k * magnitude - k**2 for k in range(3)]
            for stem in STEMS:
                assert found[f"{stem}_{i}"].dtype == np.float32
                np.testing.assert_allclose(found[f"{stem}_{i}"], expected, rtol=1e-4, atol=1e-5)


def test_a_graph_in_half_has_to_answer_as_what_it_is_made_of(graphs, tmp_path):
    for file in graphs[0].iterdir():
        shutil.copy(file, tmp_path / file.name)
    for half in HALVES.values():
        (tmp_path / half).write_bytes(b"for a GPU")
    write_selftest(tmp_path, sample_paths()[0], 16000, 1.0, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as found:
        for source, half in (("model", "model_fp16"), ("model_int8", "model_int8_fp16")):
            np.testing.assert_array_equal(found[f"{half}_0"], found[f"{source}_0"])


def test_the_card_has_the_table_of_the_certificate(graphs):
    _, metadata = graphs
    card = model_card(metadata, CERTIFICATE)
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert table == [
        "| corpus | clips | speakers | full precision | INT8 |",
        "|---|---|---|---|---|",
        "| nemo | 12 | 2 | 0.800 (0.700 to 0.850) | 0.790 (0.690 to 0.840) |",
        "| urdu | 3 | 1 | 0.500 (0.400 to 0.550) | 0.490 (0.390 to 0.540) |",
        "| pooled, all labels | 15 | | 0.700 (0.600 to 0.750) | 0.690 (0.590 to 0.740) |",
        "| condition | clips | equal answers | divergence, nats | UA, fp32 | UA, INT8 |",
        "|---|---|---|---|---|---|",
        "| 7 s | 9 | 88.9% | 1.2e-02 | 0.700 | 0.600 |",
        "| earlier utterances | how many | pooled UA |",
        "|---|---|---|",
        "| balanced | 20 | 0.765 |",
    ]
    assert "the same label as full precision on 98.8% of the clips and keeps 99.1%" in card
    assert "pooled among all labels. Seed 7." in card
    assert "96.4% were called uncertain" in card
    assert "Given back, reading what is not rounded: `c` (alone 2.0e-03 nats). Stay" in card
    assert "Stay float: 2 front end." in card


def test_the_card_names_corpora_and_languages(graphs):
    _, metadata = graphs
    lines = model_card(metadata, CERTIFICATE).splitlines()
    end = lines.index("---", 1)
    assert lines[:end] == [
        "---",
        "library_name: edge-ser",
        "pipeline_tag: audio-classification",
        "language: [pl]",
        "license: other",
    ]
    assert "# small" in lines
    assert "- nemo (pl): CC. Someone 2024" in lines


def test_metadata_describes_the_recipe(tmp_path):
    make_corpora(tmp_path, {"nemo": ("IC0", "WR0", "A")}, each=1)
    recipe = Recipe(
        "r",
        Data(("nemo",), LABELS),
        Windows(1.0, 0.5),
        EncoderChoice("whisper", 2, "somewhere"),
        train=Train(1),
    )
    confidence = {"temperature": 1.5, "abstain_below": 0.25, "scores": {}}
    found = describe(Speech(recipe, tmp_path), confidence, {"name": "t", "sha256": "0"})
    assert (found.name, found.labels, found.sample_rate_hz) == ("r", LABELS, 16000)
    assert (found.window_s, found.hop_s) == (1.0, 0.5)
    assert (found.temperature, found.abstain_below) == (1.5, 0.25)
    assert found.encoder["source"] == "somewhere"
    assert found.encoder["layers"] == 2
    assert found.head == {
        "width": 256,
        "dropout": 0.2,
        "probe_dropout": 0.2,
        "upper": 3,
        "members": 1,
    }
    assert found.teacher == {"name": "t", "sha256": "0"}
    assert [corpus["name"] for corpus in found.corpora] == ["nemo"]
    assert found.files == {}
    assert found.to_json() == json.loads(json.dumps(found.to_json()))


def test_the_tools_are_those_that_are_installed():
    import onnxruntime
    import torch

    versions = tool_versions()
    assert tuple(versions) == TOOLS
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["onnxruntime"] == onnxruntime.__version__
