import json
from pathlib import Path

import pytest

from export.__main__ import main
from export.errors import RecipeError
from export.variants import merged, read_variants
from tests.speech_corpus import LABELS, SPEAKERS, VALIDATION, make_corpora, make_whisper

BASE = f"""
name = "teacher"
[data]
corpora = {list(SPEAKERS)}
labels = {list(LABELS)}
validation = {list(VALIDATION)}
calibration_clips = 8
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
[train]
epochs = 15
views = 0
batch = 8
learning_rate = 5e-3
average = 0.9
folds = 2
"""
ABLATION = """
base = "../teacher.toml"
[variants.tuned]
train = { tuned = 1 }
[variants.deaf]
encoder = { states = 1 }
train = { epochs = 1, learning_rate = 1e-6 }
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "ablations").mkdir()
    (tmp_path / "teacher.toml").write_text(BASE)
    (tmp_path / "ablations" / "parts.toml").write_text(ABLATION)
    return tmp_path


def test_variants_are_scored_in_the_same_folds_beside_the_base(home, capsys):
    make_corpora(home / "corpora")
    make_whisper(home / "weights" / "small", seconds=2)
    places = [f"--{name}={home / name}" for name in ("corpora", "weights", "out")]
    command = ["ablate", str(home / "ablations" / "parts.toml"), *places, "--seeds", "0,1"]
    assert main(command) == 0
    table = capsys.readouterr().out
    found = json.loads((home / "out" / "parts" / "ablation.json").read_text())
    assert (home / "out" / "parts" / "ablation.md").read_text() in table
    assert list(found["variants"]) == ["base", "tuned", "deaf"]
    assert found["clips"] == 3 * 6 + 2 * 6 + 4  # no test speaker
    assert found["command"] == "python -m export ablate parts.toml --seeds 0,1"
    pooled = {name: row["pooled"] for name, row in found["variants"].items()}
    assert len(pooled["base"]["values"]) == 2
    assert pooled["base"]["mean"] > 0.8
    gain = found["variants"]["deaf"]["gain"]
    assert gain["value"] < -0.3
    assert gain["high"] < 0
    assert found["variants"]["base"]["gain"] is None
    assert found["variants"]["deaf"]["nll"]["mean"] > found["variants"]["base"]["nll"]["mean"]
    heard = {
        place: json.loads((home / "out" / place / "features" / "stage.json").read_text())["reads"]
        for place in ("teacher", "parts")  # of the base and of what hears the same; of "deaf"
    }
    assert {place: reads["encoder"]["states"] for place, reads in heard.items()} == {
        "teacher": 2, "parts": 1
    }  # fmt: skip
    before = {file: file.stat().st_mtime_ns for file in (home / "out").glob("*/*/stage.json")}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_tables_within_tables_are_merged_and_the_base_stays():
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": 4}, "e": 5}) == {"a": {"b": 4, "c": 2}, "d": 3, "e": 5}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base =", "bas =", "allowed are base = FILE, "),
        ("../teacher.toml", "nothing.toml", "cannot be read"),
        ("{ tuned = 1 }", "{ tuned = 0 }", "variant 'tuned' is the base"),
        ("{ tuned = 1 }", "{ tunes = 1 }", "unknown key 'train.tunes'"),
        ("{ tuned = 1 }", "{ tuned = 9 }", "allowed is 0, or 1 to 2"),
    ],
)
def test_an_ablation_that_cannot_be_used_is_one_line(home, capsys, old, new, message):
    student = BASE.replace("[train]", "[folds]\nk = 2\n[train]")
    (home / "ablations" / "student.toml").write_text(student)
    file = home / "ablations" / "parts.toml"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        read_variants(file)
    assert main(["ablate", str(file), "--corpora", ".", "--out", str(home / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_variants_of_the_project_can_be_read():
    folder = Path(__file__).parents[1] / "export" / "recipes"
    files = sorted(folder.glob("variants/*.toml"))
    assert len(files) > 2
    for file in files:
        base, recipes = read_variants(file)
        assert base.is_file()
        assert len(recipes) > 1


def test_what_is_common_changes_the_base_as_well(home):
    file = home / "ablations" / "parts.toml"
    file.write_text(
        ABLATION.replace("[variants.tuned]", "[common.train]\nepochs = 7\n[variants.tuned]")
    )
    _, recipes = read_variants(file)
    assert [recipe.train.epochs for recipe in recipes.values()] == [7, 7, 1]
