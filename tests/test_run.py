"""The whole way on a synthetic corpus: one real run of a teacher and its student, then variants."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.__main__ import main as benchmarks
from edge_ser import Recognizer
from edge_ser.bundle import Bundle
from edge_ser.cli import main as edge_ser
from export.__main__ import main
from export.adapt import KINDS
from export.run import Run
from export.stage import KEY_FILE
from tests.speech_corpus import (
    LABELS,
    RESONANCES_HZ,
    SPEAKERS,
    VALIDATION,
    make_corpora,
    make_whisper,
    voice,
)

ROOT = Path(__file__).parents[1]
STAGES = ("train", "graph", "quantize", "certify", "bundle")

TEACHER = f"""
name = "teacher"
[data]
corpora = {list(SPEAKERS)}
labels = {list(LABELS)}
validation = {list(VALIDATION)}
calibration_clips = 16
[windows]
window_s = 1.0
hop_s = 0.5
[encoder]
family = "whisper"
source = "small"
layers = 2
states = 2
[head]
width = 16
dropout = 0.1
[train]
epochs = 20
views = 1
batch = 8
learning_rate = 5e-3
average = 0.9
tuned = 1
folds = 3
"""

STUDENT = f"""
name = "student"
[data]
corpora = {list(SPEAKERS)}
labels = {list(LABELS)}
validation = {list(VALIDATION)}
calibration_clips = 16
[windows]
window_s = 1.0
hop_s = 0.5
[encoder]
family = "mel"
source = "small"
layers = 1
width = 32
[head]
width = 16
dropout = 0.1
[distill]
teacher = "teacher.toml"
cpu_minutes = 0.08
views = 1
batch = 8
learning_rate = 5e-3
average = 0.9
"""

FOLDS = f"""
name = "folded"
[data]
corpora = ["ravdess"]
labels = {list(LABELS)}
[windows]
window_s = 1.0
hop_s = 0.5
[encoder]
family = "whisper"
source = "small"
layers = 2
[head]
width = 16
[train]
epochs = 15
views = 0
batch = 8
learning_rate = 5e-3
ridge = 100
average = 0.9
[folds]
k = 3
"""


def arguments(home, recipe, *more):
    """Return the command line of a run; ``home`` has recipes, corpora, weights and out."""
    places = ["--corpora", home / "corpora", "--weights", home / "weights", "--out", home / "out"]
    return [str(part) for part in ("run", home / f"{recipe}.toml", *places, *more)]


def started(home, recipe, *more):
    """Start the command in a process of its own, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "export", *arguments(home, recipe, *more)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "WARNING" not in errors  # the libraries' advice is not for the user
    return output


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Run the teacher with seed 0 and the student with seeds 0 and 1, once for all tests."""
    folder = tmp_path_factory.mktemp("home")
    make_corpora(folder / "corpora")
    make_whisper(folder / "weights" / "small", seconds=2)
    recipes = {"teacher": TEACHER, "student": STUDENT, "folded": FOLDS}
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text)
    finished(started(folder, "teacher"))
    finished(started(folder, "student", "--seeds", "0,1"))
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """Return a copy of the home with the teacher's results, to spoil."""
    for name in ("teacher.toml", "student.toml", "folded.toml"):
        shutil.copy(home / name, tmp_path / name)
    for name in ("corpora", "weights"):
        (tmp_path / name).symlink_to(home / name)
    shutil.copytree(home / "out" / "teacher", tmp_path / "out" / "teacher")
    return tmp_path


def change(home, recipe, old, new):
    file = home / f"{recipe}.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def made(home, recipe="teacher"):
    """Return when each stage was made, by the place of its folder."""
    folder = home / "out" / recipe
    return {
        file.parent.relative_to(folder).as_posix(): file.stat().st_mtime_ns
        for file in folder.rglob(KEY_FILE)
    }


def remade(before, after):
    return {place for place in after if before.get(place) != after[place]}


def seeded(*stages, seed=0):
    return {f"seed{seed}/{stage}" for stage in stages}


def failure(capsys, home, recipe, *more):
    """Run in this process and return the last line, which must be the only one of the error."""
    assert main(arguments(home, recipe, *more)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("export: ")
    return line.removeprefix("export: ")


BUNDLES = ["teacher/seed0", "student/seed0", "student/seed1"]


@pytest.mark.parametrize("place", BUNDLES)
def test_a_bundle_answers_speakers_that_nobody_has_heard(home, place):
    recognizer = Recognizer.load(home / "out" / place / "bundle", threads=1)
    for label, resonance_hz in RESONANCES_HZ.items():
        samples = voice(resonance_hz, 131.0, 1.3, seed=977)
        prediction = recognizer.predict(samples, 16000)
        assert prediction.label == label
        assert len(prediction.windows) == 2


@pytest.mark.parametrize("place", BUNDLES)
def test_a_bundle_verifies(home, place, capsys):
    assert edge_ser(["verify", "--bundle", str(home / "out" / place / "bundle")]) == 0
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("place", BUNDLES)
def test_the_certificate_says_what_was_scored(home, place):
    folder = home / "out" / place / "bundle"
    found = json.loads((folder / "certificate.json").read_text())
    assert found["test_speakers"] == [
        "nemo/IC0", "nemo/WR0", "ravdess/16", "ravdess/17", "ravdess/18", "ravdess/19",
        "turev/1358", "turev/6783",
    ]  # fmt: skip
    assert found["validation_speakers"] == sorted(VALIDATION)
    assert len(set(found["calibration"])) == 16
    assert found["systems"]["fp32"]["pooled"]["clips"] == 4 * 6 + 2 * 6 + 2 * 4
    assert found["systems"]["fp32"]["pooled"]["ua"]["value"] > 0.9
    assert all(gate["passed"] for gate in found["gate"].values())
    assert found["parity"]["worst_logit_difference"] < 1e-4
    files = Bundle.open(folder).metadata.files
    for system in found["systems"].values():
        assert system["sha256"] == files[system["graph"]].sha256
    assert ("baselines" in found) == place.startswith("teacher")


def test_what_is_certified_is_what_the_bundle_predicts(home):
    from export.corpora import load_corpora
    from export.splits import TEST_SPEAKERS

    folder = home / "out" / "teacher" / "seed0" / "bundle"
    recognizer = Recognizer.load(folder, precision="fp32", threads=1)
    clips = [
        c for c in load_corpora(home / "corpora", list(SPEAKERS)) if c.speaker_key in TEST_SPEAKERS
    ]
    matrix = np.zeros((3, 3), int)
    for clip in clips:
        answer = recognizer.predict(clip.path).label
        matrix[LABELS.index(clip.emotion), LABELS.index(answer)] += 1
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["systems"]["fp32"]["pooled"]["confusion"] == matrix.tolist()


def test_the_student_names_its_teacher(home):
    metadata = Bundle.open(home / "out" / "student" / "seed0" / "bundle").metadata
    assert metadata.teacher["name"] == "teacher"
    assert metadata.encoder["family"] == "mel"


def test_the_student_that_has_heard_everybody_is_shipped(home, copy):
    def weights(place, name=""):
        train = place / "out" / "student" / "seed0" / "train"
        return (train / name / "model.safetensors").read_bytes()

    assert weights(home) == weights(home, "refit") != weights(home, "choice")
    change(copy, "student", "cpu_minutes = 0.08", "cpu_minutes = 0.01\nrefit = false")
    assert main(arguments(copy, "student", "--only", "train")) == 0
    assert weights(copy) == weights(copy, "choice")
    assert not (copy / "out" / "student" / "seed0" / "train" / "refit").exists()


@pytest.mark.parametrize(("recipe", "expected"), [("teacher", 4), ("student", 2), ("folded", 3)])
def test_a_run_tells_how_many_trainings_share_the_cores(home, recipe, expected):
    run = Run(home / f"{recipe}.toml", home / "corpora", home / "weights", home / "out")
    assert run.trainings == expected


def test_seeds_differ_and_are_summed_up(home):
    weights = [
        (home / "out" / "student" / f"seed{n}" / "train" / "model.safetensors").read_bytes()
        for n in (0, 1)
    ]
    assert weights[0] != weights[1]
    summary = json.loads((home / "out" / "student" / "seeds.json").read_text())
    assert summary["seeds"] == [0, 1]
    certificates = [
        json.loads(
            (home / "out" / "student" / f"seed{n}" / "certify" / "certificate.json").read_text()
        )
        for n in (0, 1)
    ]
    for system, row in summary["systems"].items():
        values = [c["systems"][system]["pooled"]["ua"]["value"] for c in certificates]
        assert row["pooled"]["values"] == values
        assert row["pooled"]["mean"] == pytest.approx(np.mean(values))
        pooled = [c["systems"][system]["pooled"] for c in certificates]
        assert summary["intervals"][system] == [[p["ua"]["low"], p["ua"]["high"]] for p in pooled]
        if "ece" in pooled[0]:
            sure = summary["confidence"][system]
            assert sure["ece"]["values"] == [p["ece"] for p in pooled]
            high = [p["ece_if_calibrated"]["high"] for p in pooled]
            assert sure["ece if calibrated, high"]["values"] == high
            assert sure["wrong of the surest half"]["values"] == [p["risk"]["0.5"] for p in pooled]
            assert sure["wrong of all"]["values"] == [p["risk"]["1.0"] for p in pooled]
    assert summary["adaptation"].keys() == {"test speakers"}
    rows = summary["adaptation"]["test speakers"]
    assert rows[0]["history"] == "none"
    assert rows[4]["pooled_ua"]["values"] == [c["adapted"][4]["pooled_ua"] for c in certificates]
    teacher = json.loads((home / "out/teacher/seed0/certify/certificate.json").read_text())
    teacher = teacher["systems"]["int8_x86"]
    mine = summary["systems"]["int8_x86"]
    assert summary["teacher_seeds"] == 1
    assert summary["kept_of_teacher"] == {
        "pooled": pytest.approx(mine["pooled"]["mean"] / teacher["pooled"]["ua"]["value"]),
        "masked mean": pytest.approx(mine["masked mean"]["mean"] / teacher["masked_ua_mean"]),
    }
    text = (home / "out" / "student" / "seeds.md").read_text()
    assert "| int8_x86 |" in text
    assert text.splitlines()[-1].startswith("| single | ")


def test_no_augmented_view_of_a_test_speaker_is_kept(home):
    from export.corpora import load_corpora
    from export.splits import TEST_SPEAKERS
    from export.views import load_views

    clips = load_corpora(home / "corpora", list(SPEAKERS))
    (targets,) = (home / "out" / "teacher").glob("targets-*")
    for folder in (home / "out" / "teacher" / "features", targets):
        views = load_views(folder)
        augmented = {clips[view.clip].speaker_key for view in views if view.number}
        assert augmented
        assert not augmented & set(TEST_SPEAKERS)
        assert {view.clip for view in views} == set(range(len(clips)))


def test_nothing_is_made_twice(copy, capsys):
    before = {file: file.stat().st_mtime_ns for file in (copy / "out").rglob("*")}
    assert main(arguments(copy, "teacher")) == 0
    assert {file: file.stat().st_mtime_ns for file in (copy / "out").rglob("*")} == before
    lines = [line for line in capsys.readouterr().err.splitlines() if "nothing changed" in line]
    assert len(lines) == 2 + len(STAGES)


def test_a_changed_key_makes_again_what_depends_on_it_and_nothing_else(copy):
    before = made(copy)
    change(copy, "teacher", "[train]", "[quantize]\nclipping = true\n[train]")
    assert main(arguments(copy, "teacher")) == 0
    assert remade(before, made(copy)) == seeded("quantize", "certify", "bundle")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--from", "certify"), seeded("certify", "bundle")),
        (("--from", "bundle"), seeded("bundle")),
    ],
)
def test_from_makes_a_stage_and_all_later_ones(copy, more, expected):
    before = made(copy)
    assert main(arguments(copy, "teacher", *more)) == 0
    assert remade(before, made(copy)) == expected
    assert made(copy).keys() == before.keys()


def test_only_makes_a_stage_and_stops(home, copy):
    before = made(copy)
    assert main(arguments(copy, "teacher", "--only", "quantize")) == 0
    assert alike(home, copy, "quantize/model_int8.bin")
    assert remade(before, made(copy)) == seeded("quantize")
    assert before.keys() - made(copy).keys() == seeded("certify", "bundle")


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)


def alive(group):
    """Return whether a process of a group is still there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(home, copy):
    shutil.rmtree(copy / "out" / "teacher" / "seed0")
    process = started(copy, "teacher")
    head = copy / "out" / "teacher" / "seed0" / "train.partial" / "fold0"
    checkpoint = head / "member0" / "checkpoint.pt"
    wait_for(checkpoint.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoint.exists()
    assert not (copy / "out" / "teacher" / "seed0" / "train").exists()
    process = started(copy, "teacher")
    trained = copy / "out" / "teacher" / "seed0" / "train"
    wait_for(trained.exists, process)
    os.killpg(process.pid, signal.SIGKILL)  # what follows the training is not looked at
    assert "going on where it was" in process.communicate()[1]
    assert alike(home, copy, "train/model.safetensors")


def alike(home, copy, file):
    one, other = (place / "out" / "teacher" / "seed0" / file for place in (home, copy))
    return one.read_bytes() == other.read_bytes()


def test_no_process_outlives_a_killed_run(copy):
    process = started(copy, "student", "--seeds", "0,1")
    home = copy / "out" / "student"
    try:
        wait_for(lambda: any(home.glob("seed*/train.partial/refit/checkpoint.pt")), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):
            if not alive(process.pid):
                break
            time.sleep(0.1)
        assert not alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_folds_score_head_and_probe_on_the_same_clips(copy):
    assert main(arguments(copy, "folded")) == 0
    found = json.loads((copy / "out" / "folded" / "seed0" / "folds" / "folds.json").read_text())
    assert found["folds"] == {"k": 3, "seed": 0}
    for system in found["systems"].values():
        assert system["pooled"]["clips"] == 7 * 6
        assert system["pooled"]["ua"]["value"] > 0.9
    assert "ece" in found["systems"]["head"]["pooled"]
    assert "ece" not in found["systems"]["linear_probe"]["pooled"]
    assert {row["history"] for row in found["adaptation"]} == {"none", *KINDS}
    assert not (copy / "out" / "folded" / "baselines").exists()
    assert not (copy / "out" / "folded" / "seed0" / "bundle").exists()


def spoil(graphs):
    """Let INT8 hold a hundredth of what it has to: it cannot keep the labels."""
    for name in ("model_int8.onnx", "model_int8_x86.onnx"):
        model = onnx.load(graphs / name, load_external_data=False)
        for node in model.graph.node:
            if node.op_type != "QuantizeLinear":
                continue
            (scale,) = [t for t in model.graph.initializer if t.name == node.input[1]]
            smaller = numpy_helper.to_array(scale) * np.float32(0.01)
            scale.CopyFrom(numpy_helper.from_array(np.array(smaller), scale.name))
        onnx.save(model, graphs / name)


def test_a_missed_gate_fails_and_names_classes_and_layers(copy, capsys):
    spoil(copy / "out" / "teacher" / "seed0" / "quantize")
    line = failure(capsys, copy, "teacher", "--from", "certify")
    found = json.loads((copy / "out/teacher/seed0/certify.partial/certificate.json").read_text())
    assert not found["gate"]["int8"]["passed"]
    layers = list(found["quantization"]["alone"])[:3]
    lost = found["gate"]["int8"]["recall_lost"]
    classes = sorted(lost, key=lost.get, reverse=True)[:2]
    assert line.startswith("int8 keeps ")
    assert line.endswith(
        f"most recall is lost on {', '.join(classes)}; "
        f"INT8 costs most in the layers {', '.join(layers)}"
    )
    assert not (copy / "out" / "teacher" / "seed0" / "bundle").exists()


def test_a_seed_that_misses_its_gate_is_named_and_the_others_are_finished(home, tmp_path):
    place = tmp_path / "home"
    shutil.copytree(home, place, symlinks=True)
    seeds = [place / "out" / "student" / f"seed{seed}" for seed in (0, 1)]
    for folder in seeds:
        for stage in ("certify", "bundle"):
            shutil.rmtree(folder / stage)
    spoil(seeds[0] / "quantize")
    process = started(place, "student", "--seeds", "0,1")
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 1
    (told,) = [line for line in lines if line.startswith("seed ")]
    assert told.startswith("seed 0: int8 keeps ")
    assert lines[-1].endswith(told.removeprefix("seed 0: "))
    assert [(folder / "bundle").is_dir() for folder in seeds] == [False, True]


def test_an_unknown_key_is_one_line(copy, capsys):
    change(copy, "teacher", "epochs", "epoch")
    line = failure(capsys, copy, "teacher")
    assert line.startswith(f"{copy / 'teacher.toml'}: unknown key 'train.epoch'; allowed: epochs, ")


def test_a_missing_corpus_is_one_line(copy, capsys):
    change(copy, "teacher", "'nemo'", "'nemmo'")
    expected = f"no corpus 'nemmo' in {copy / 'corpora'}, there are ['nemo', 'ravdess', 'turev']"
    assert failure(capsys, copy, "teacher") == expected


def test_a_missing_weight_is_one_line(copy, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change(copy, "teacher", '"small"', '"large"')
    line = failure(capsys, copy, "teacher")
    assert line.startswith("no checkpoint 'large': neither a folder under --weights nor a hub id (")


def test_a_teacher_that_was_not_run_is_one_line(copy, capsys):
    shutil.rmtree(copy / "out" / "teacher")
    trained = copy / "out" / "teacher" / "seed0" / "train"
    assert failure(capsys, copy, "student") == (
        f"no teacher {str(trained)!r}; run {copy / 'teacher.toml'} with the same --out first, "
        "--seeds 0"
    )


CANDIDATES = """
base = "student.toml"
[common]
distill = { cpu_minutes = 0.04, refit = false }
[variants.slim]
encoder = { family = "whisper", layers = 1, states = 2, heads = 1, feed_forward = 32 }
"""
VARIANTS = f"""
{CANDIDATES}
[variants.wav]
encoder = {{ family = "wav", source = "", layers = 1, width = 32 }}
distill = {{ warp = 0, mask_mels = 0, layers = 1 }}
"""


def test_candidates_are_distilled_timed_and_drawn(copy, capsys):
    (copy / "front.toml").write_text(CANDIDATES)
    command = ["front", *arguments(copy, "front")[1:]]
    assert main(command) == 0
    table = capsys.readouterr().out
    found = json.loads((copy / "out" / "front" / "front.json").read_text())
    assert (copy / "out" / "front" / "front.md").read_text() in table
    assert (copy / "out" / "front" / "front.png").stat().st_size > 10_000
    rows = found["candidates"]
    assert set(rows) == {"teacher", "student", "slim"}
    assert found["clips"] == 2 * 6  # of validation speakers
    for name, row in rows.items():
        assert len(row["pooled"]["values"]) == 1
        assert row["ms"] > 0
        home = copy / "out" / (name if name == "teacher" else f"front-{name}") / "seed0"
        files = ("model_int8_x86.onnx", "model_int8.bin")
        size = sum((home / "quantize" / file).stat().st_size for file in files)
        assert row["mb"] == pytest.approx(size / 1e6, abs=0.005)
    assert any(row.get("front") for row in rows.values())
    assert not list(copy.glob("out/front-*/*/certify"))  # test speakers are not for choosing
    before = made(copy, "front-slim")
    assert main(command) == 0
    assert made(copy, "front-slim") == before


def test_variants_of_a_student_answer_the_validation_speakers(copy, capsys):
    (copy / "parts.toml").write_text(VARIANTS)
    command = ["ablate", *arguments(copy, "parts")[1:]]
    assert main(command) == 0
    found = json.loads((copy / "out" / "parts" / "ablation.json").read_text())
    assert list(found["variants"]) == ["base", "slim", "wav"]
    assert found["clips"] == 2 * 6
    before = made(copy, "parts")
    assert len(before) == 3
    assert main(command) == 0
    assert made(copy, "parts") == before
    assert len(list((copy / "out" / "teacher").glob("targets-*"))) == 2  # mel bands, and samples


@pytest.mark.parametrize("recipe", ["teacher", "student"])
def test_small_changes_of_a_recording_are_asked(home, recipe, capsys):
    command = ["robustness", *arguments(home, recipe)[1:]]
    assert main(command) == 0
    found = json.loads((home / "out" / recipe / "robustness.json").read_text())
    assert found["clips"] == 2 * 6
    # Synthetic voices are easily told apart, whatever their level.
    assert found["pooled_ua"]["mean"] > 0.8
    assert found["unchanged"]["level"]["mean"] > 0.8
    assert found["ua_change"]["level"]["mean"] < 0.2
    assert (home / "out" / recipe / "robustness.md").read_text() in capsys.readouterr().out


def test_what_was_not_run_is_not_asked(copy, capsys):
    shutil.rmtree(copy / "out" / "teacher" / "seed0")
    for recipe, message in (("teacher", "nothing at"), ("folded", "a recipe with [folds]")):
        assert main(["robustness", *arguments(copy, recipe)[1:]]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_only_students_are_candidates(copy, capsys):
    (copy / "front.toml").write_text(
        'base = "teacher.toml"\n[variants.longer]\ntrain = { epochs = 31 }\n'
    )
    assert main(["front", *arguments(copy, "front")[1:]]) == 1
    expected = "candidates are students; base must be a recipe with [distill]"
    assert capsys.readouterr().err.endswith(f"{expected}\n")


def test_folds_have_no_variants(copy, capsys):
    (copy / "parts.toml").write_text(
        'base = "folded.toml"\n[variants.longer]\ntrain = { epochs = 16 }\n'
    )
    assert main(["ablate", *arguments(copy, "parts")[1:]]) == 1
    expected = "a recipe with [folds] has no variants; leave [folds] out"
    assert capsys.readouterr().err.endswith(f"{expected}\n")


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("teacher", ("features", "baselines", *STAGES)),
        ("student", ("targets", *STAGES)),
        ("folded", ("features", "folds")),
    ],
)
@pytest.mark.parametrize("option", ["--only", "--from"])
def test_an_unknown_stage_is_one_line(copy, capsys, recipe, stages, option):
    expected = f"stage 'polish': {copy / f'{recipe}.toml'} has the stages {', '.join(stages)}"
    assert failure(capsys, copy, recipe, option, "polish") == expected


def test_int8_is_compared_on_speakers_that_no_head_has_heard(home, capsys, tmp_path):
    places = [part for part in arguments(home, "teacher") if part != "run"]
    written = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    variants = tmp_path / "variants.toml"
    variants.write_text(
        f'base = "{home}/teacher.toml"\n[common]\nquantize = {{ most_float = 0 }}\n'
        "[variants.none]\nquantize = { smoothing = 0.0, centring = false, gptq = false }\n"
    )
    assert benchmarks(["accuracy", *places, *written, "--variants", str(variants)]) == 0
    table = capsys.readouterr().out
    assert "| base | as it is | " in table
    assert "| none | as it is | " in table
    found = json.loads((tmp_path / "a.json").read_text())
    clips = sum(2 * 3 * len(names) for names in SPEAKERS.values()) - 2 * len(SPEAKERS["turev"])
    assert {row["clips"] for row in found["rows"]} == {clips}
    assert {row["system"]: row["labels_equal"] > 0.9 for row in found["rows"]} == {
        "base": True,
        "none": True,
    }
    assert list(found["given_back"]) == ["fold0", "fold1", "fold2", "whole"]
    answers = home / "out" / "teacher" / "seed0" / "accuracy-variants"
    before = {file: file.stat().st_mtime_ns for file in answers.glob("*/answers of */*.json")}
    assert len(before) == 4 * 3 * 3  # heads; systems; answers, conditions and what they hang on
    variants.write_text(variants.read_text().replace("gptq = false", "gptq = true"))
    stopped = answers / "whole" / "answers of base"
    stopped.rename(stopped.with_name("answers of base.partial"))
    assert benchmarks(["accuracy", *places, "--variants", str(variants)]) == 0
    after = {file: file.stat().st_mtime_ns for file in before}
    again = {file for file in before if after[file] != before[file]}
    assert {file.parent.name for file in again} == {"answers of none", "answers of base"}
    assert [file.name for file in again if file.parent == stopped] == ["conditions.json"]
    capsys.readouterr()
    assert benchmarks(["accuracy", *places, "--seed", "5"]) == 1
    assert "run a recipe with [train] first: python -m export run" in capsys.readouterr().err
