import json
import platform

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import foreign
from benchmarks.__main__ import main
from benchmarks.answers import ANSWERS, ask, compare, facts
from benchmarks.emulate import choose, emulation_markdown
from benchmarks.machine import ROOT
from benchmarks.pins import platform_options, resolve
from benchmarks.saturation import EXACT, LENGTH, SATURATED, with_seven_bits, write_product
from edge_ser.bundle import INT8_GRAPH, X86_GRAPH, Bundle
from edge_ser.engines import has_vnni
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.errors import DeviceError, EngineError
from edge_ser.samples import sample_paths
from edge_ser.selftest import deviation
from edge_ser.testing import list_files, make_bundle
from export.errors import CorpusError
from export.frames import turned_weights
from export.stage import partial_of
from tests.speech_corpus import SPEAKERS, make_corpora

RESULT = ROOT / "benchmarks" / "results" / "emulation.json"
X86 = platform.machine() in ("x86_64", "AMD64")
SAMPLES = [str(path) for path in sample_paths()]


# comparing


def answers(*probs):
    return [{"clip": f"{n}.wav", "probs": one, "s": n} for n, one in enumerate(probs)]


def test_labels_and_differences_of_probabilities():
    found = answers([0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1])
    reference = answers([0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [1, 0, 0])
    assert compare(found, reference[::-1]) == {
        "clips": 3,
        "labels_equal": pytest.approx(2 / 3),
        "median": pytest.approx(0),
        "largest": pytest.approx(0.2),
        "worst": "2.wav",
    }


def test_the_median_is_that_of_all_probabilities():
    found = answers([0.5, 0.5, 0], [0.9, 0.1, 0])
    reference = answers([0.6, 0.4, 0], [0.6, 0.4, 0])
    assert compare(found, reference)["median"] == pytest.approx(0.1)


def test_what_a_system_tells_of_itself():
    lines = [{"graph": "g", "resampled": [0.5, 0.25, -0.5]}, *answers([1, 0], [1, 0], [0, 1])]
    here = [{"graph": "h", "resampled": [0.5, 0.5, -0.625]}]
    assert facts(lines, here) == {"graph": "g", "resampled_apart": 0.25, "clip_s": 1}


# choosing


def test_clips_are_drawn_evenly_over_corpora_and_emotions(tmp_path):
    corpora = make_corpora(tmp_path)
    found = choose(corpora, 16)
    strata = [(clip.corpus, clip.emotion) for clip in found]
    assert len({clip.path for clip in found}) == 16
    assert len(set(strata)) == len(set(strata[:8])) == 8  # three, three and two emotions
    assert {strata.count(one) for one in strata} == {2}
    assert {clip.corpus for clip in found} == set(SPEAKERS)
    assert choose(corpora, 16) == found
    assert choose(corpora, 8) == found[:8]


def test_clips_that_the_runtime_refuses_are_not_drawn(tmp_path):
    manifest = make_corpora(tmp_path, {"nemo": ("A",)}, each=1) / "nemo" / "manifest.csv"
    lines = manifest.read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ",0.39"
    manifest.write_text("\n".join(lines))
    assert {clip.path.name for clip in choose(tmp_path, 2)} == {"002.wav", "003.wav"}
    with pytest.raises(CorpusError, match="3 clips asked for, there are 2"):
        choose(tmp_path, 3)


# asking


@pytest.fixture
def product(tmp_path):
    write_product(tmp_path / "product.onnx")
    return tmp_path / "product.onnx"


def job(bundle, product, clips, machine=None):
    return {
        "bundle": str(bundle), "machine": machine, "float": False, "product": str(product),
        "clips": clips,
    }  # fmt: skip


def test_a_process_answers_as_the_runtime_does(tmp_path, product):
    bundle = make_bundle(tmp_path / "bundle")
    asked = job(bundle, product, SAMPLES)
    told, *found = ask(foreign.own_command(), asked, tmp_path / "answers", {})
    assert [one["clip"] for one in found] == SAMPLES
    for one in found:
        assert sum(one["probs"]) == pytest.approx(1)
    assert told["graph"] == (X86_GRAPH if X86 else INT8_GRAPH)
    assert (told["machine"], told["vnni"]) == (platform.machine(), has_vnni())
    assert told["versions"]["numpy"] == np.__version__
    assert told["deviation"] < 1e-5
    assert told["log"] == []
    if has_vnni() or not X86:
        assert told["products"] == [EXACT]


def test_the_graph_of_another_machine_can_be_asked(tmp_path, product):
    bundle = make_bundle(tmp_path / "bundle")
    asked = job(bundle, product, SAMPLES[:1], "aarch64")
    told, _ = ask(foreign.own_command(), asked, tmp_path / "answers", {})
    assert told["graph"] == INT8_GRAPH


def test_a_graph_can_be_asked_in_float(tmp_path, product):
    bundle = make_bundle(tmp_path / "bundle")
    asked = {**job(bundle, product, SAMPLES[:1], "aarch64"), "float": True}
    told, _ = ask(foreign.own_command(), asked, tmp_path / "answers", {})
    assert told["graph"] == f"{INT8_GRAPH} (float)"


def test_a_run_that_was_stopped_goes_on_after_the_last_whole_line(tmp_path, product):
    asked = job(make_bundle(tmp_path / "bundle"), product, SAMPLES)
    folder = tmp_path / "answers"
    _, *whole = ask(foreign.own_command(), asked, folder, {})
    known = [{"told": "before"}, {"clip": SAMPLES[0], "probs": [0, 0, 1], "s": 7}]
    stopped = partial_of(folder)
    folder.rename(stopped)
    cut = json.dumps(whole[1])[:20]
    (stopped / ANSWERS).write_text("".join(json.dumps(one) + "\n" for one in known) + cut)
    found = ask(foreign.own_command(), asked, folder, {})
    assert found[:2] == known
    for one, expected in zip(found[2:], whole[1:], strict=True):
        assert (one["clip"], one["probs"]) == (expected["clip"], expected["probs"])
    assert not stopped.exists()


def test_what_was_answered_is_not_asked_again_until_something_changes(tmp_path, product):
    asked = job(make_bundle(tmp_path / "bundle"), product, SAMPLES[:1])
    found = ask(foreign.own_command(), asked, tmp_path / "answers", {"code": 1})
    assert ask(["false"], asked, tmp_path / "answers", {"code": 1}) == found
    with pytest.raises(EngineError, match=r"answers ended with 1: it told no reason$"):
        ask(["false"], asked, tmp_path / "answers", {"code": 2})


def test_a_process_that_fails_says_why_in_one_line(tmp_path, product):
    asked = job(make_bundle(tmp_path / "bundle"), product, [SAMPLES[0], "none.wav"])
    with pytest.raises(EngineError) as error:
        ask(foreign.own_command(), asked, tmp_path / "answers", {})
    assert str(error.value) == (
        "answers ended with 1: edge_ser.errors.AudioError: 'none.wav' does not exist; "
        "give the path of an audio file"
    )
    kept = (partial_of(tmp_path / "answers") / ANSWERS).read_text().splitlines()
    assert len(kept) == 2  # the facts and the first clip


# saturation


def test_seven_bits_are_the_same_weights_rounded_to_twice_the_step(tmp_path):
    tiny = Bundle.open("tiny")
    with_seven_bits(tiny, tmp_path)
    before, after = (weights(onnx.load(folder / X86_GRAPH)) for folder in (tiny.path, tmp_path))
    assert before.keys() == after.keys()
    assert len(before) > 5
    assert max(np.abs(values).max() for values, _ in before.values()) == 127
    for name, (values, scale) in after.items():
        was, its_scale = before[name]
        np.testing.assert_array_equal(scale, 2 * its_scale)
        assert np.abs(2 * values.astype(int) - was).max() <= 1
        assert 2 * 255 * np.abs(values.astype(int)).max() <= 32767
    opened = Bundle.open(tmp_path)
    assert deviation(opened, OnnxEngine(tmp_path / X86_GRAPH, threads=1)) == 0
    for number in range(3):
        with np.load(tmp_path / "selftest.npz") as new, np.load(tiny.path / "selftest.npz") as old:
            name = f"model_int8_x86_{number}"
            apart = np.abs(new[name] - old[name]).max() / np.abs(old[name]).max()
        assert 0 < apart < 0.3


def weights(model):
    """Return INT8 weights, those of convolutions too, and their scales by name."""
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    turned = turned_weights(model.graph)
    pairs = [node.input for node in model.graph.node if node.op_type == "DequantizeLinear"]
    found = {(turned.get(one[0], one[0]), one[1]) for one in pairs}
    return {name: (constants[name], constants[its]) for name, its in found if name in constants}


def test_what_is_left_when_two_products_are_added_in_16_bits():
    pairs = np.full(LENGTH // 2, 2 * 255 * 127)
    assert (pairs.sum(), pairs.clip(-32768, 32767).sum()) == (EXACT, SATURATED)


# other processors


def emulated(out, cpu):
    try:
        foreign.emulator(cpu)
    except ImportError as exc:
        pytest.skip(str(exc))
    return foreign.x86_command(out, cpu)


def loudness(largest, classes=3, peak=0.5):
    """Return a graph like that of `make_bundle`, in INT8 with weights up to the largest.

    The mean absolute sample stands in LENGTH unsigned activations, 255 where it is the peak.
    """
    columns = np.full((LENGTH, classes), largest, np.int8)
    step = 8 * np.arange(classes) * peak / (255 * LENGTH * largest)
    constants = {
        "ones": np.ones((1, LENGTH), np.float32), "scale": np.float32(peak / 255),
        "zero": np.uint8(0), "weights": columns, "step": step.astype(np.float32),
        "bias": -(np.arange(classes, dtype=np.float32) ** 2),
    }  # fmt: skip
    nodes = [
        helper.make_node("Abs", ["samples"], ["magnitude"]),
        helper.make_node("ReduceMean", ["magnitude"], ["embedding"], axes=[1], keepdims=1),
        helper.make_node("MatMul", ["embedding", "ones"], ["repeated"]),
        helper.make_node("QuantizeLinear", ["repeated", "scale", "zero"], ["activations"]),
        helper.make_node("MatMulInteger", ["activations", "weights"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "step"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["logits"]),
    ]
    return nodes, [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]


def saturating_bundle(folder, largest):
    make_bundle(folder)
    model = onnx.load(folder / X86_GRAPH, load_external_data=False)
    nodes, constants = loudness(largest)
    for part, new in ((model.graph.node, nodes), (model.graph.initializer, constants)):
        del part[:]
        part.extend(new)
    onnx.save(model, folder / X86_GRAPH)
    document = json.loads((folder / "metadata.json").read_text())
    document["files"] = list_files(folder, set())
    (folder / "metadata.json").write_text(json.dumps(document))
    return folder


@pytest.mark.skipif(not X86, reason="this Python does not run on an emulated x86")
@pytest.mark.parametrize(
    ("cpu", "largest", "graph", "sums"),
    [
        (foreign.AVX2, 127, f"{INT8_GRAPH} (float)", SATURATED),
        (foreign.AVX2, 64, X86_GRAPH, SATURATED),
        (foreign.SSE4, 127, X86_GRAPH, EXACT),
    ],
)
def test_without_vnni_the_self_test_decides_on_the_processor(
    tmp_path, product, cpu, largest, graph, sums
):
    command = emulated(tmp_path, cpu)
    asked = job(saturating_bundle(tmp_path / "bundle", largest), product, SAMPLES[:1])
    told, answer = ask(command, asked, tmp_path / "answers", {})
    _, expected = ask(foreign.own_command(), asked, tmp_path / "own", {})
    assert (told["vnni"], told["graph"], told["products"]) == (False, graph, [sums])
    if cpu is foreign.AVX2 and largest == 127:
        # Half of the largest logit's product is lost: 8 x 2 x .5 x (1 - 32767 / 64770) of 4.
        off = 8 * (1 - 32767 / 64770) / 4
        assert told["deviation"] == pytest.approx(off, abs=1e-3)
        (line,) = told["log"]
        assert line == (
            f"no VNNI, and the self-test of {X86_GRAPH} is off by {off:.2g} (allowed: 0.05): "
            f"{INT8_GRAPH} runs in float, more slowly"
        )
    else:
        assert told["deviation"] < 0.01
        assert told["log"] == []
    np.testing.assert_allclose(answer["probs"], expected["probs"], atol=0.01)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    try:
        return foreign.build_wheel(tmp_path_factory.mktemp("wheel"))
    except DeviceError as exc:
        pytest.skip(str(exc))


def test_arm_answers_as_this_machine_does_with_the_same_graph(tmp_path, product, wheel):
    """Real packages and wheels: 20 s to fetch and unpack, and 15 s of emulation."""
    try:
        foreign.check()
        command = foreign.arm_command(tmp_path, wheel)
    except (ImportError, DeviceError) as exc:
        pytest.skip(str(exc))
    told, *found = ask(command, job("tiny", product, SAMPLES), tmp_path / "answers", {})
    asked = {**job("tiny", product, SAMPLES, "aarch64"), "float": not has_vnni()}
    own, *expected = ask(foreign.own_command(), asked, tmp_path / "own", {})
    assert (told["machine"], told["graph"]) == ("aarch64", INT8_GRAPH)
    assert (told["vnni"], told["products"], told["log"]) == (False, [EXACT], [])
    assert told["versions"]["python"].startswith(foreign.PYTHON)
    assert told["deviation"] < 1e-3
    row = compare(found, expected)
    assert (row["clips"], row["labels_equal"]) == (3, 1)
    assert row["largest"] < (1e-3 if has_vnni() else 1e-2)  # float kernels round elsewhere
    assert facts([told, *found], [own])["resampled_apart"] < 1e-5
    # What is there is not fetched again.
    assert foreign.arm_command(tmp_path, wheel) == command


# pins


def test_wheels_for_a_newer_c_library_are_not_taken():
    options = platform_options("3.10", 35)
    assert options[0] == "--platform=manylinux_2_35_aarch64"
    assert "--platform=manylinux_2_17_aarch64" in options
    assert "--python-version=3.10" in options
    assert len(options) == 19 + 1 + 3


@pytest.mark.parametrize(
    ("python", "glibc", "more", "expected"),
    [
        # The last that were built for Python 3.10.
        ("3.10", 35, ["cuda-bindings<13"], {"numpy": "2.2.6", "onnxruntime": "1.23.2"}),
        ("3.12", 39, [], {}),
    ],
)
def test_jetpacks_python_finds_wheels_for_all_that_we_require(wheel, python, glibc, more, expected):
    try:
        found = resolve([f"edge-ser[cpu,tensorrt] @ {wheel.as_uri()}", *more], python, glibc)
    except DeviceError as exc:
        pytest.skip(str(exc))
    assert found.items() >= expected.items()
    assert {"numpy", "soundfile", "soxr", "onnxruntime", "cuda-bindings"} <= found.keys()
    assert int(found["cuda-bindings"].split(".")[0]) == (12 if more else 13)


# the command


def test_what_is_not_installed_is_said_with_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["emulate", f"--corpora={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err == (
        "benchmarks: qemu-aarch64-static is not installed; run: "
        "apt-get install qemu-user-static mmdebstrap debian-archive-keyring\n"
    )


@pytest.mark.parametrize("count", ["0", "9"])
def test_x86_is_asked_some_of_the_clips(tmp_path, capsys, count):
    words = [f"--corpora={tmp_path}", f"--out={tmp_path}", "--clips=8", f"--x86-clips={count}"]
    with pytest.raises(SystemExit) as error:
        main(["emulate", *words])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        f"benchmarks: argument --x86-clips: {count}; allowed: 1 to --clips, 8\n"
    )


def test_a_program_that_fails_is_one_line():
    with pytest.raises(DeviceError, match=r"^false \.\.\. failed: it told no reason$"):
        foreign.output_of("false")


def test_the_published_table_is_that_of_the_published_numbers():
    result = json.loads(RESULT.read_text())
    text = RESULT.with_suffix(".md").read_text()
    assert text == emulation_markdown(result)
    assert "That holds: yes." in text
    result["rows"][0]["median"] = 2e-3
    assert "That holds: no." in emulation_markdown(result)
