import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy
from sklearn.metrics import recall_score

from benchmarks.__main__ import main
from benchmarks.accuracy import EQUAL, accuracy_markdown, holds, rows
from benchmarks.report import accuracy_plot
from benchmarks.unheard import AS_IT_IS, FP32, OURS, parts
from export.corpora import Clip
from export.errors import RecipeError
from export.recipe_file import recipe_from
from export.speech import Speech
from export.splits import pooled, speakers
from tests.speech_corpus import LABELS, SPEAKERS, VALIDATION, make_corpora


def clips(count, speaker):
    """Return clips of one speaker, their emotions in turns."""
    return [
        Clip("ravdess", "ravdess", None, LABELS[place % 3], speaker, "f", "en", 1.0)
        for place in range(count)
    ]


def answers(count, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(3), count)


@pytest.fixture
def found():
    """Two heads, one asked for 6 clips of 7 and one for 9 of 9; a system beside full precision."""
    exact = [answers(6, 0), answers(9, 1)]
    other = [0.5 * one + 0.5 * answers(len(one), 2) for one in exact]
    heads = [
        {"clips": places, "probs": {FP32: one.tolist(), OURS: two.tolist()}}
        for places, one, two in zip(([0, 1, 2, 4, 5, 6], range(9)), exact, other, strict=True)
    ]
    return [clips(7, "a"), clips(9, "b")], heads, np.concatenate(exact), np.concatenate(other)


def test_a_row_is_what_other_libraries_say(found):
    asked, heads, exact, other = found
    (row,) = rows(AS_IT_IS, heads, asked, LABELS)
    true = [0, 1, 2, 1, 2, 0, *([0, 1, 2] * 3)]
    assert row["clips"] == 15
    for key, probs in (("fp32", exact), ("ua", other)):
        expected = recall_score(true, probs.argmax(axis=1), average="macro")
        assert row[key] == pytest.approx(expected)
    assert row["divergence"] == pytest.approx(entropy(exact, other, axis=1).mean())
    same = exact.argmax(axis=1) == other.argmax(axis=1)
    assert 0 < row["labels_equal"] == same.mean() < 1
    assert row["difference"]["value"] == pytest.approx(row["ua"] - row["fp32"])
    assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]


def row(condition, equal, value=0.0, low=-0.005):
    difference = {"value": value, "low": low, "high": 0.01}
    facts = {"clips": 9, "divergence": 0.0, "fp32": 0.7, "ua": 0.7 + value}
    return {
        "condition": condition, "system": OURS, "labels_equal": equal, "difference": difference,
        **facts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([row(AS_IT_IS, 0.99), row("1 s", EQUAL)], True),
        ([row(AS_IT_IS, 0.99), row("1 s", 0.9849)], False),
        ([row(AS_IT_IS, 0.99, value=-0.0031)], False),
        ([row(AS_IT_IS, 0.99, low=-0.011)], False),
        ([row(AS_IT_IS, 0.99), row("1 s", 0.99, value=-0.1, low=-0.2)], True),
    ],
)
def test_what_must_hold(found, expected):
    assert holds(found) is expected


def test_the_table_and_the_picture_have_every_row(tmp_path):
    result = {
        "command": "python -m benchmarks accuracy default.toml --seed 0",
        "recipe": "default",
        "seed": 0,
        "refused": {"modelopt default": "nvidia-modelopt is not installed"},
        "rows": [row(AS_IT_IS, 0.991, value=-0.002), {**row(AS_IT_IS, 0.98), "system": "other"}],
    }
    table = accuracy_markdown(result)
    assert "| edge_ser INT8 | as it is | 9 | 99.1% | 0.0e+00 | 0.700 | 0.698 | -0.20 (" in table
    assert "| other | as it is | 9 | 98.0% |" in table
    assert "| modelopt default | not measured: nvidia-modelopt is not installed |" in table
    assert table.endswith("That holds: edge_ser INT8.\n")
    result["rows"][1] |= {"system": OURS, "condition": "1 s"}
    assert accuracy_markdown(result).endswith("That holds: none.\n")
    accuracy_plot(result, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"


def small(folder, folds):
    """Return speech of a recipe."""
    document = {
        "name": "small",
        "data": {
            "corpora": list(SPEAKERS), "labels": list(LABELS), "validation": list(VALIDATION),
            "calibration_clips": 16,
        },
        "windows": {"window_s": 1.0, "hop_s": 0.5},
        "encoder": {"family": "whisper", "source": "small", "layers": 1},
        "train": {"epochs": 1, "folds": folds},
    }  # fmt: skip
    return Speech(recipe_from(document, folder), make_corpora(folder))


def test_every_clip_is_asked_once_of_a_head_that_knows_nothing_of_its_speaker(tmp_path):
    speech = small(tmp_path, folds=3)
    found = parts(speech, tmp_path)
    assert [part.head.name for part in found] == ["fold0", "fold1", "fold2", "whole"]
    asked = [clip for part in found for clip in part.asked]
    assert sorted(c.path for c in asked) == sorted(c.path for c in pooled(speech.clips))
    assert speakers(found[-1].asked) == speakers(speech.split.test)
    for part in found:
        away = speakers(part.asked)
        assert part.calibration
        assert part.judged
        assert not speakers(part.calibration) & (away | speakers(speech.split.test))
        assert not speakers(part.judged) & (away | speakers(speech.split.test))
        assert not set(part.calibration) & set(part.judged)


def test_a_head_that_has_heard_no_speaker_of_the_calibration_is_one_line(tmp_path):
    with pytest.raises(
        RecipeError, match=r"^fold[01]: it has heard none of the speakers that INT8"
    ):
        parts(small(tmp_path, folds=2), tmp_path)


def test_a_tool_that_is_not_known_is_refused(tmp_path, capsys):
    places = ["--corpora", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as status:
        main(["accuracy", str(tmp_path), *places, "--tools", "onnxruntime_dynamic,magic"])
    assert status.value.code == 2
    assert capsys.readouterr().err == (
        "benchmarks: argument --tools: 'magic'; allowed: onnxruntime_dynamic, onnxruntime_static, "
        "modelopt_default\n"
    )


def test_no_tool_is_a_choice_of_tools(tmp_path, capsys):
    places = ["--corpora", str(tmp_path), "--out", str(tmp_path)]
    assert main(["accuracy", str(tmp_path), *places, "--tools", ""]) == 1  # a folder is no recipe
    assert "--tools" not in capsys.readouterr().err
