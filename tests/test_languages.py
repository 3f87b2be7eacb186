import json

import pytest

from export.__main__ import main
from tests.speech_corpus import make_corpora, make_whisper
from tests.test_ablation import BASE

LANGUAGES = {"ravdess": "en", "nemo": "pl", "turev": "tr"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_corpora(folder / "corpora")
    for corpus, language in LANGUAGES.items():
        manifest = folder / "corpora" / corpus / "manifest.csv"
        manifest.write_text(manifest.read_text().replace(",en,", f",{language},"))
    make_whisper(folder / "weights" / "small", seconds=2)
    (folder / "teacher.toml").write_text(BASE)
    return folder


def command(home, recipe="teacher.toml"):
    places = [f"--{name}={home / name}" for name in ("corpora", "weights", "out")]
    return ["languages", str(home / recipe), *places]


def test_every_language_is_answered_by_a_model_of_the_others(home, capsys):
    assert main(["run", *command(home)[1:], "--only", "features"]) == 0
    folder = home / "out" / "teacher"
    made = (folder / "features" / "stage.json").stat().st_mtime_ns
    assert main([*command(home), "--seeds", "0,1"]) == 0
    assert (folder / "features" / "stage.json").stat().st_mtime_ns == made
    found = json.loads((folder / "languages.json").read_text())["languages"]
    assert {name: row["clips"] for name, row in found.items()} == {"en": 18, "pl": 12, "tr": 4}
    assert (folder / "languages.md").read_text() in capsys.readouterr().out
    for language, row in found.items():
        assert len(row["masked_ua"]["values"]) == 2
        corpus = next(name for name, spoken in LANGUAGES.items() if spoken == language)
        assert row["corpora"] == {corpus: row["masked_ua"]}
    # The synthetic emotions sound alike in all languages.
    assert found["en"]["masked_ua"]["mean"] > 0.5
    from safetensors.torch import load_file

    stored = [
        load_file(folder / "seed0" / "languages" / f"fold{n}" / "model.safetensors")
        for n in range(3)
    ]
    assert (stored[0]["probe.weight"] != stored[1]["probe.weight"]).any()


def test_one_language_cannot_be_left_out(home, capsys):
    text = BASE.replace("['ravdess', 'nemo', 'turev']", "['ravdess']").replace(
        "['ravdess/03', 'nemo/B']", "['ravdess/03']"
    )
    (home / "one.toml").write_text(text.replace('name = "teacher"', 'name = "one"'))
    assert main(command(home, "one.toml")) == 1
    assert "all clips are in 'en'" in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_without_training_is_refused(home, capsys):
    (home / "folds.toml").write_text(BASE + "[folds]\nk = 2\n")
    assert main(command(home, "folds.toml")) == 1
    assert "needed is a recipe with [train]" in capsys.readouterr().err
