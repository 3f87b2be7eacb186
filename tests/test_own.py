import csv
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import HubertConfig, HubertForSequenceClassification, Wav2Vec2FeatureExtractor

from edge_ser import Recognizer
from edge_ser.bundle import Bundle
from edge_ser.cli import main as edge_ser
from export.__main__ import main
from export.adopt import adopt
from export.corpora import load_corpora, read_samples
from export.encoders.wav2vec2 import normalised
from export.errors import RecipeError
from export.pairs import largest_sum
from tests.speech_corpus import LABELS, make_corpora
from tests.test_wav2vec2 import SIZES

SPEAKERS = {"nemo": tuple("ABCDEFGH"), "turev": tuple("IJKL")}
STILL = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Speech, ``train.csv`` and ``test.csv`` of it, and a checkpoint that is fine-tuned on it."""
    home = tmp_path_factory.mktemp("own")
    make_corpora(home, SPEAKERS)
    clips = load_corpora(home, list(SPEAKERS))
    told = {"train": [], "test": []}
    for number, clip in enumerate(clips):
        told["test" if number % 4 == 0 else "train"].append(clip)
    for name, chosen in told.items():
        rows = [[f"{c.corpus}/{c.path.name}", c.emotion, c.speaker] for c in chosen]
        write(home / f"{name}.csv", [["path", "emotion", "speaker"], *rows])
    fine_tune(told["train"]).save_pretrained(home / "mine")
    Wav2Vec2FeatureExtractor().save_pretrained(home / "mine")
    return home


def write(file, rows):
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def fine_tune(clips):
    torch.manual_seed(0)
    sizes = {**SIZES, "conv_dim": (32,) * 7, "num_hidden_layers": 2, "classifier_proj_size": 16}
    still = dict.fromkeys((*STILL, "layerdrop", "mask_time_prob"), 0.0)
    config = HubertConfig(**sizes, **still, id2label=dict(enumerate(LABELS)))
    model = HubertForSequenceClassification(config)
    heard = normalised(torch.tensor(np.stack([read_samples(c, 16000)[:9600] for c in clips])))
    true = torch.tensor([LABELS.index(clip.emotion) for clip in clips])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(35):
        for batch in torch.randperm(len(clips)).split(16):
            loss = torch.nn.functional.cross_entropy(model(heard[batch]).logits, true[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.5
    return model.eval()


def command(home, model, *more):
    return [
        "quantize", str(model), "--calibration", str(home / "train.csv"), "--out",
        str(home / "out"), "--window", "1.0", "--hop", "0.5", *more,
    ]  # fmt: skip


def test_a_fine_tuned_folder_becomes_a_certified_bundle_in_one_command(home, capsys):
    test, file = str(home / "test.csv"), home / "mine.json"
    assert main(command(home, home / "mine", "--evaluation", test, "--json", str(file))) == 0
    out = capsys.readouterr().out
    folder = home / "out" / "mine" / "bundle"
    assert out.splitlines()[-1] == f"certified: edge-ser predict FILE --bundle {folder}"
    bundle = Bundle.open(folder)
    assert bundle.metadata.certified
    assert bundle.metadata.labels == LABELS
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["gate"]["int8_x86"]["passed"]
    told = json.loads(file.read_text())
    assert (told["name"], told["certified"]) == ("mine", True)
    int8 = told["graphs"]["int8_x86"]
    files = [folder / name for name in ("model_int8_x86.onnx", "model_int8.bin")]
    assert int8["mb"] == pytest.approx(sum(one.stat().st_size for one in files) / 1e6)
    assert int8["ua"] == certificate["systems"]["int8_x86"]["pooled"]["ua"]
    assert told["float_layers"] == certificate["quantization"]["given_back"]
    assert certificate["parity"]["worst_logit_difference"] < 1e-4
    assert certificate["systems"]["fp32"]["pooled"]["ua"]["value"] > 0.9
    assert [row["condition"] for row in certificate["conditions"]][:2] == ["1 s", "as it is"]
    # What it was calibrated with is not what it was judged and scored by.
    lines = (home / "test.csv").read_text().splitlines()[1:]
    named = {line.split(",")[0].split("/")[1] for line in lines}
    assert not named & set(certificate["calibration"])
    assert len(certificate["calibration"]) == 36
    # It answers as transformers does.
    model = HubertForSequenceClassification.from_pretrained(home / "mine").eval()
    samples = read_samples(load_corpora(home, ["nemo"])[5], 16000)[:16000]
    with torch.no_grad():
        expected = model(normalised(torch.tensor(samples[None]))).logits[0] / (
            bundle.metadata.temperature
        )
    probs = Recognizer.load(folder, precision="fp32").predict(samples, 16000).probs
    np.testing.assert_allclose(list(probs.values()), expected.softmax(dim=0), atol=1e-4)
    # Again, nothing is made again.
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert main(command(home, home / "mine", "--evaluation", test)) == 0
    assert capsys.readouterr().err.count("nothing changed") == 5
    assert times == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def loudness(file, *, classes=3, extra=0.0):
    """Write a graph whose label is how loud it is, by a layer that INT8 can take or lose."""
    gain = np.zeros((64, classes), np.float32)
    gain[:, :] = np.arange(classes) * 8 / 64
    gain[0] += extra
    nodes = [
        helper.make_node("Abs", ["audio"], ["magnitude"]),
        helper.make_node("ReduceMean", ["magnitude"], ["level"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["level", "ones"], ["wide"]),
        helper.make_node("MatMul", ["wide", "gain"], ["product"], "first"),
        helper.make_node("Tanh", ["product"], ["bent"]),
        helper.make_node("Transpose", ["last_transposed"], ["last"], perm=[1, 0]),
        helper.make_node("MatMul", ["bent", "last"], ["scores"], "second"),
    ]
    constants = {"ones": np.ones(64), "gain": gain, "last_transposed": np.eye(classes) * 3}
    graph = helper.make_graph(
        nodes,
        "loudness",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "time"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    return file


def test_an_onnx_file_becomes_a_bundle_without_labelled_speech(home, tmp_path, capsys):
    model = loudness(tmp_path / "loud.onnx")
    rows = [[f"nemo/{file.name}"] for file in sorted((home / "nemo").glob("*.wav"))]
    write(home / "plain.csv", [["path"], *rows])
    arguments = command(home, model, "--labels", "low,mid,high")
    arguments[3] = str(home / "plain.csv")
    assert main(arguments) == 0
    folder = home / "out" / "loud" / "bundle"
    assert re.search(
        r"\| INT8 \| 0.0 \| \d.\d\d \| 100.0% \| not measured \|", capsys.readouterr().out
    )
    metadata = Bundle.open(folder).metadata
    assert (metadata.temperature, metadata.abstain_below) == (1.0, 0.0)
    assert "pooled" not in json.loads((folder / "certificate.json").read_text())["systems"]["fp32"]
    samples = np.full(8000, 0.25, np.float32)
    bent = np.tanh(np.arange(3) * 8 * 0.25) * 3
    probs = Recognizer.load(folder, precision="fp32").predict(samples, 16000).probs
    np.testing.assert_allclose(list(probs.values()), np.exp(bent) / np.exp(bent).sum(), rtol=1e-5)


def test_a_model_that_misses_the_gate_is_refused_or_says_so(home, monkeypatch, capsys):
    monkeypatch.setattr("export.certify.LABELS_EQUAL", 1.01)  # nothing reaches that
    test = str(home / "test.csv")
    more = ("--evaluation", test, "--name", "missed", "--any-x86")
    assert main(command(home, home / "mine", *more)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("export: int8 keeps ")
    assert "most recall is lost on" in line
    assert "INT8 costs most in the layers encoder.model." in line
    assert line.endswith("; --allow-uncertified packs it all the same")
    folder = home / "out" / "missed" / "bundle"
    assert not folder.exists()
    assert main(command(home, home / "mine", *more, "--allow-uncertified")) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT certified: ")
    assert not Bundle.open(folder).metadata.certified
    assert largest_sum(onnx.load(folder / "model_int8.onnx")) <= 128  # --any-x86
    plain = home / "out" / "mine" / "bundle" / "model_int8.onnx"
    assert largest_sum(onnx.load(plain)) > 128
    assert "NOT certified" in (folder / "README.md").read_text()
    assert edge_ser(["info", "--bundle", str(folder)]) == 0
    assert "certified  no: " in capsys.readouterr().out


def refused(arguments, capsys):
    assert main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("export: ")


def test_mistakes_are_one_line(home, tmp_path, capsys):
    model = loudness(tmp_path / "m.onnx")
    assert refused(command(home, model), capsys) == (
        "an ONNX file needs --labels, in the order of its logits"
    )
    assert refused(command(home, model, "--labels", "a,b"), capsys) == (
        f"'{model}' has 3 logits, but there are 2 labels (a, b)"
    )
    line = refused(command(home, home / "mine", "--labels", "a,b"), capsys)
    assert line == f"2 labels, but '{home / 'mine'}' has 3 logits"
    few = home / "few.csv"
    write(few, [["path"], *[[f"nemo/{n:03}.wav"] for n in range(1, 11)]])
    arguments = command(home, model)
    arguments[3] = str(few)
    assert refused(arguments, capsys) == f"{few}: 10 clips, allowed are 16 or more"
    write(few, [["path", "emotion"], ["nemo/001.wav", "joy"]])
    more = ("--labels", "low,mid,high", "--evaluation", str(few))
    assert refused(command(home, model, *more), capsys) == (
        f"{few}: emotion 'joy', allowed are low, mid, high"
    )
    write(few, [["path", "emotion"], ["nemo/002.wav", "low"]])
    assert refused(command(home, model, *more), capsys) == (
        f"{few}: '002.wav' is calibrated with as well"
    )
    with pytest.raises(SystemExit):
        main(command(home, model, "--labels", "a,a"))
    assert "allowed: two or more names" in capsys.readouterr().err


def changed(file, change):
    model = onnx.load(file)
    change(model)
    onnx.save(model, file)


def fixed(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16000


def whole(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def old(model):
    model.opset_import[0].version = 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fixed, "takes audio ['batch', 16000] only; export it with both axes dynamic"),
        (old, "has opset 11; allowed are 17 to 22"),
        (whole, "cannot be read as ONNX|has audio"),
    ],
)
def test_a_graph_of_another_form_is_refused(tmp_path, change, message):
    file = loudness(tmp_path / "m.onnx")
    changed(file, change)
    with pytest.raises(RecipeError, match=message.replace("[", r"\[").replace("]", r"\]")):
        adopt(file, ("a", "b", "c"), {}, tmp_path / "out.onnx")


def test_text_is_not_onnx(tmp_path):
    (tmp_path / "m.onnx").write_text("model")
    with pytest.raises(RecipeError, match="cannot be read as ONNX"):
        adopt(tmp_path / "m.onnx", ("a", "b"), {}, tmp_path / "out.onnx")


def test_weights_that_are_computed_from_constants_become_constants(tmp_path):
    adopt(loudness(tmp_path / "m.onnx"), ("a", "b", "c"), {"x": 1}, tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 2
    assert all(node.input[1] in constants for node in products)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert [value.name for value in model.graph.output] == ["logits", "embedding"]
    assert {p.key: p.value for p in model.metadata_props} == {"x": "1"}


def call_it_embedding(model):
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = ["embedding" if value == "bent" else value for value in values]


def test_a_value_inside_may_be_called_as_an_output_is(tmp_path):
    file = loudness(tmp_path / "m.onnx")
    changed(file, call_it_embedding)
    adopt(file, ("a", "b", "c"), {}, tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    logits, embedding = session.run(None, {"samples": np.full((1, 100), 0.25, np.float32)})
    np.testing.assert_array_equal(logits, embedding)
    np.testing.assert_allclose(logits[0], np.tanh(np.arange(3) * 8 * 0.25) * 3, rtol=1e-6)


def test_an_embedding_of_the_graph_is_kept(tmp_path):
    file = loudness(tmp_path / "m.onnx")

    def tell(model):
        call_it_embedding(model)
        shape = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3])
        model.graph.output.append(shape)

    changed(file, tell)
    adopt(file, ("a", "b", "c"), {}, tmp_path / "out.onnx")
    graph = onnx.load(tmp_path / "out.onnx").graph
    assert not [node for node in graph.node if node.op_type == "Identity"]
    producer = next(node for node in graph.node if "embedding" in node.output)
    assert producer.op_type == "Tanh"
