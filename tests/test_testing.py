import json

import numpy as np

from edge_ser.bundle import Bundle
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.testing import FakeEngine, expected_logits, list_files, make_bundle


def test_expected_logits_by_hand():
    samples = np.array([0.5, -0.5, 0.25, -0.25])  # mean of the magnitudes: 0.375
    np.testing.assert_array_equal(expected_logits(samples, 3), [0.0, 2.0, 2.0])


def test_a_made_bundle_opens_and_holds_what_a_real_one_does(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "b", fp32=True, hop_s=1.0))
    assert set(bundle.metadata.files) == {
        "README.md",
        "certificate.json",
        "model.onnx",
        "model_int8.bin",
        "model_int8.onnx",
        "model_int8_x86.onnx",
        "selftest.npz",
    }
    assert bundle.metadata.hop_s == 1.0
    assert not bundle.metadata.files["model.onnx"].required
    assert bundle.metadata.files["model_int8.bin"].required


def test_its_int8_graphs_take_their_weights_from_the_shared_file(tmp_path):
    folder = make_bundle(tmp_path)
    samples = np.full((1, 8000), 0.5, np.float32)
    before = OnnxEngine(folder / "model_int8.onnx").run(samples)
    (folder / "model_int8.bin").write_bytes(np.array([0, 80, 0], "<f4").tobytes())
    after = OnnxEngine(folder / "model_int8.onnx").run(samples)
    np.testing.assert_allclose(before, [[0, 3, 4]])
    np.testing.assert_allclose(after, [[0, 39, -4]])


def test_list_files_leaves_out_the_metadata_only(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "a").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list_files(tmp_path, {"a"}) == {"a": {"sha256": sha256, "required": False}}


def test_the_certificate_says_that_it_certifies_nothing(tmp_path):
    note = json.loads((make_bundle(tmp_path) / "certificate.json").read_text())["note"]
    assert note == "made by edge_ser.testing, certifies nothing"


def test_a_fake_engine_returns_its_logits_in_turn_and_keeps_the_calls():
    engine = FakeEngine([1.0, 2.0], [3.0, 4.0])
    runs = [engine.run(np.zeros((2, n), np.float32)).tolist() for n in (5, 6, 7)]
    assert runs == [[[1, 2], [1, 2]], [[3, 4], [3, 4]], [[3, 4], [3, 4]]]
    assert [call.shape for call in engine.calls] == [(2, 5), (2, 6), (2, 7)]
    engine.close()
    assert engine.closed
