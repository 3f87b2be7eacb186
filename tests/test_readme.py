import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_example_runs_and_prints_a_label():
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    label, confidence, uncertain = done.stdout.split()
    assert label in {"anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"}
    assert 1 / 7 <= float(confidence) <= 1
    assert uncertain in {"True", "False"}


def test_the_first_commands_install_and_classify_the_second_install_and_test():
    first, second = blocks("sh")
    assert first.splitlines()[-1] == "edge-ser predict --sample"
    assert second.splitlines()[-1] == "pytest"


def test_every_file_that_it_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:export|edge_ser|benchmarks|tests)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
