import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import export
from export.augment import Augmentation
from export.errors import RecipeError
from export.recipe import (
    Data,
    Distill,
    EncoderChoice,
    Folds,
    HeadChoice,
    Recipe,
    Train,
    Windows,
)
from export.recipe_file import read_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((Path(export.__file__).parent / "recipes").glob("*.toml"))

SMALL = """
name = "small"
[data]
corpora = ["emodb"]
labels = ["anger", "fear"]
[windows]
window_s = 3.0
hop_s = 1.5
[encoder]
family = "whisper"
source = "small"
layers = 3
[train]
epochs = 20
"""

STUDENT = SMALL.replace("whisper", "mel").replace(
    "[train]\nepochs = 20", '[distill]\nteacher = "teacher.toml"\ncpu_minutes = 5.0'
)


def read(folder, text):
    file = folder / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(file)


def refusal(folder, text):
    """The message without the path that it starts with."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    path, message = str(caught.value).split(": ", 1)
    assert path == str(folder / "recipe.toml")
    assert "\n" not in message
    return message


def test_what_a_recipe_leaves_out_has_its_default(tmp_path):
    assert read(tmp_path, SMALL) == Recipe(
        name="small",
        data=Data(("emodb",), ("anger", "fear"), {}, (), 256),
        windows=Windows(3.0, 1.5),
        encoder=EncoderChoice("whisper", 3, "small", 3, 256),
        head=HeadChoice(256, 0.2),
        augmentation=Augmentation(),
        train=Train(20),
        distill=None,
        folds=None,
    )


def test_every_part_is_read_as_its_type(tmp_path):
    text = SMALL.replace(
        "[windows]", 'merge = { calm = "fear" }\nvalidation = ["a/1", "a/2"]\n[windows]'
    )
    text += "[folds]\nk = 5\nseed = 3\n[head]\nwidth = 8\n[augmentation]\nsnr_db = [0, 9]\n"
    recipe = read(tmp_path, text)
    assert recipe.data.merge == {"calm": "fear"}
    assert recipe.data.validation == ("a/1", "a/2")
    assert recipe.folds == Folds(5, 3)
    assert recipe.head == HeadChoice(8)
    assert recipe.augmentation.snr_db == (0.0, 9.0)
    assert [type(value) for value in recipe.augmentation.snr_db] == [float, float]


@pytest.mark.parametrize(
    ("text", "members", "expected"),
    [
        (SMALL, 0, "head.members = 0: 1 or more are allowed"),
        (
            SMALL + "tuned = 2\n",
            3,
            "head.members = 3: above 1 only with [train], and without tuned",
        ),
        (STUDENT, 3, "head.members = 3: above 1 only with [train], and without tuned"),
    ],
)
def test_members_that_cannot_be_trained_are_refused(tmp_path, text, members, expected):
    assert refusal(tmp_path, f"{text}\n[head]\nmembers = {members}\n") == expected


def test_a_whole_number_will_do_for_a_float(tmp_path):
    window_s = read(tmp_path, SMALL.replace("window_s = 3.0", "window_s = 3")).windows.window_s
    assert window_s == 3.0 and type(window_s) is float


def test_a_student_is_distilled(tmp_path):
    recipe = read(tmp_path, STUDENT)
    assert recipe.train is None
    assert recipe.distill == Distill("teacher.toml", 5.0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_project_is_read_with_all_that_it_says(path):
    def holds(part, table):
        for key, value in table.items():
            read = getattr(part, key)
            if is_dataclass(read):
                holds(read, value)
            else:
                assert read == (tuple(value) if isinstance(value, list) else value)

    recipe = read_recipe(path)
    holds(recipe, tomllib.loads(path.read_text(encoding="utf-8")))
    assert recipe.name == path.stem


def test_the_project_has_recipes():
    assert "default" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("key", [field.name for field in fields(Recipe)])
def test_every_part_refuses_a_key_it_does_not_know(tmp_path, key):
    if key == "name":
        message = refusal(tmp_path, "colour = 1\n" + SMALL)
        assert message.startswith("unknown key 'colour'; allowed: name, data, windows, ")
        return
    base = STUDENT if key == "distill" else SMALL
    text = base.replace(f"[{key}]", f"[{key}]\ncolour = 1")
    if f"[{key}]" not in base:
        text += f"[{key}]\ncolour = 1\n"
    assert refusal(tmp_path, text).startswith(f"unknown key '{key}.colour'; allowed: ")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('name = "small"', "name"),
        ('corpora = ["emodb"]', "data.corpora"),
        ("hop_s = 1.5", "windows.hop_s"),
        ("layers = 3", "encoder.layers"),
        ("epochs = 20", "train.epochs"),
    ],
)
def test_a_missing_key_is_named(tmp_path, line, key):
    assert line in SMALL
    assert refusal(tmp_path, SMALL.replace(line, "")) == f"key {key!r} is missing"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 20", "epochs = 20.0", "train.epochs = 20.0; allowed is int"),
        ("epochs = 20", "epochs = true", "train.epochs = True; allowed is int"),
        ("epochs = 20", 'epochs = "20"', "train.epochs = '20'; allowed is int"),
        ("window_s = 3.0", 'window_s = "3"', "windows.window_s = '3'; allowed is float"),
        ("window_s = 3.0", "window_s = false", "windows.window_s = False; allowed is float"),
        ('"small"', "7", "name = 7; allowed is str"),
        ('["emodb"]', '"emodb"', "data.corpora = 'emodb'; allowed is tuple[str, ...]"),
        ('["emodb"]', "[1]", "data.corpora = 1; allowed is str"),
        ("[windows]", "merge = 1\n[windows]", "data.merge = 1; allowed is dict[str, str]"),
        ("[windows]", "merge = {a = 1}\n[windows]", "data.merge.a = 1; allowed is str"),
        (
            "[windows]",
            "[augmentation]\nspeed = [1.0]\n[windows]",
            "augmentation.speed = [1.0]; allowed is tuple[float, float]",
        ),
        (
            "[windows]\nwindow_s = 3.0\nhop_s = 1.5",
            "[[windows]]",
            "windows = [{}]; allowed is Windows",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, old, new, message):
    assert old in SMALL
    assert refusal(tmp_path, SMALL.replace(old, new)) == message


def test_a_value_out_of_range_is_refused_by_the_part_that_knows(tmp_path):
    text = SMALL + "[augmentation]\nnoise = 1.5\n"
    assert refusal(tmp_path, text) == "noise = 1.5, allowed is a probability, 0 to 1"


@pytest.mark.parametrize(
    ("window_s", "hop_s"), [("3.0", "0.0"), ("3.0", "2.7"), ("61.0", "1.0"), ("nan", "1.5")]
)
def test_windows_that_no_bundle_may_have_are_refused(tmp_path, window_s, hop_s):
    text = SMALL.replace("window_s = 3.0", f"window_s = {window_s}")
    assert refusal(tmp_path, text.replace("hop_s = 1.5", f"hop_s = {hop_s}")) == (
        f"windows of {window_s} s every {hop_s} s, "
        "allowed are windows up to 60 s, every 0.01 s to 0.4 s less than the window"
    )


def test_the_longest_window_and_the_least_overlap_are_taken(tmp_path):
    text = SMALL.replace("window_s = 3.0", "window_s = 60").replace("hop_s = 1.5", "hop_s = 59.6")
    assert read(tmp_path, text).windows == Windows(60.0, 59.6)


@pytest.mark.parametrize(
    "labels", ["[]", '["anger"]', '["anger", "anger"]', '["anger", "fear", "anger"]']
)
def test_fewer_than_two_different_labels_are_refused(tmp_path, labels):
    text = SMALL.replace('["anger", "fear"]', labels)
    assert refusal(tmp_path, text).endswith("allowed are two or more, each once")


@pytest.mark.parametrize(
    "text",
    [
        SMALL.replace("[train]\nepochs = 20\n", ""),
        SMALL + STUDENT[STUDENT.index("[distill]") :],
    ],
    ids=["neither", "both"],
)
def test_a_recipe_either_trains_or_distills(tmp_path, text):
    message = refusal(tmp_path, text)
    assert message == "a recipe has either [train] or [distill], exactly one of them"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SMALL.replace("whisper", "mel"),
            "encoder.family = 'mel': [train] takes whisper, wav2vec2; [distill] whisper, mel, wav",
        ),
        (
            STUDENT.replace("mel", "wav2vec2"),
            "encoder.family = 'wav2vec2': [train] takes whisper, wav2vec2; [distill] whisper, mel, "
            "wav",
        ),
        (
            SMALL.replace("whisper", "hubert"),
            "encoder.family = 'hubert', allowed are ['mel', 'wav', 'wav2vec2', 'whisper']",
        ),
        (
            STUDENT.replace("mel", "wav"),
            "encoder.source = 'small': wav has no checkpoint, all others need one",
        ),
        (
            STUDENT.replace('"mel"', '"wav"\nwidth = 48').replace('source = "small"', ""),
            "encoder.width = 48: of wav, multiples of 32 are allowed",
        ),
        (
            STUDENT.replace("mel", "wav").replace('source = "small"', ""),
            "wav hears no mel bands: set distill.warp and mask_mels to 0",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, text, message):
    assert refusal(tmp_path, text) == message


def test_a_missing_file_is_named(tmp_path):
    file = tmp_path / "none.toml"
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value) == f"recipe {str(file)!r} cannot be read (No such file or directory)"


@pytest.mark.parametrize("content", [b"name = ", b"name = 'x'\nname = 'y'", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"recipe {str(file)!r} is not TOML (")
