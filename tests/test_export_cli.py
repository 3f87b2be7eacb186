import pytest

from export.__main__ import main, parser

RUN = ["run", "r.toml", "--corpora", "c", "--out", "o"]


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("2", (2,)), ("0,1,2", (0, 1, 2))])
def test_seeds_are_numbers(text, seeds):
    assert parser().parse_args([*RUN, "--seeds", text]).seeds == seeds


@pytest.mark.parametrize("text", ["", "a", "0,", "1,1", "-1", "0 1", "1.5"])
def test_other_seeds_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*RUN, f"--seeds={text}"])
    assert stop.value.code == 2
    expected = f"argument --seeds: {text!r}; allowed: different numbers, such as 0,1,2"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


def test_one_seed_is_the_default():
    args = parser().parse_args(RUN)
    assert args.seeds == (0,)
    assert (args.only, args.start, args.weights, args.debug) == (None, None, None, False)


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["walk"],
        ["run"],
        ["run", "r.toml", "--corpora", "c"],
        [*RUN, "--only", "train", "--from", "graph"],
        [*RUN, "--fast"],
    ],
)
def test_wrong_usage_is_2(line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m export")


@pytest.mark.parametrize("line", [["--help"], ["run", "--help"]])
def test_help_has_examples(line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 0
    assert "--seeds 0,1,2" in capsys.readouterr().out


def test_a_failure_is_one_line_and_1(tmp_path, capsys):
    missing = tmp_path / "missing.toml"
    assert main(["run", str(missing), "--corpora", "c", "--out", "o"]) == 1
    line = f"export: recipe {str(missing)!r} cannot be read (No such file or directory)\n"
    assert capsys.readouterr() == ("", line)


def test_debug_raises(tmp_path):
    from export.errors import RecipeError

    line = ["run", str(tmp_path / "r.toml"), "--corpora", "c", "--out", "o", "--debug"]
    with pytest.raises(RecipeError):
        main(line)
