import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from export.stage import KEY_FILE, discard, fingerprint, run_stage


@dataclass(frozen=True)
class Settings:
    epochs: int
    rate: float = 0.5


class Work:
    """Fills a folder in three steps, each a file, and stops before step `stop`."""

    def __init__(self, stop=3):
        self.stop = stop
        self.made = []

    def __call__(self, folder):
        for step in range(3):
            if step == self.stop:
                raise KeyboardInterrupt
            if not (folder / str(step)).exists():
                (folder / str(step)).write_text(f"step {step}")
                self.made.append(step)


def stop_after(steps, folder, reads):
    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, reads, Work(stop=steps))


def contents(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_folder_appears_with_its_key_and_nothing_else(tmp_path):
    key = run_stage(tmp_path / "deep" / "one.v2", {"a": 1}, Work())
    assert contents(tmp_path / "deep") == ["one.v2"]
    assert contents(tmp_path / "deep" / "one.v2") == ["0", "1", "2", KEY_FILE]
    document = json.loads((tmp_path / "deep" / "one.v2" / KEY_FILE).read_text())
    assert document == {"key": key, "reads": {"a": 1}}
    assert key == hashlib.sha256(b'{"a": 1}').hexdigest()


READS = {"settings": Settings(3), "pair": (1, 2.5), "after": None, "text": "ä"}


def test_unchanged_inputs_are_not_made_again(tmp_path, capsys):
    folder, again = tmp_path / "one", Work()
    key = run_stage(folder, READS, Work())
    reordered = dict(reversed(READS.items()))
    assert run_stage(folder, reordered, again) == key
    assert again.made == []
    assert capsys.readouterr().err == f"{folder}: started\n{folder}: nothing changed\n"


@pytest.mark.parametrize(
    "change",
    [
        {"settings": Settings(4)},
        {"settings": Settings(3, 0.25)},
        {"pair": (2.5, 1)},
        {"after": "key"},
        {"text": "a"},
        {"more": 1},
    ],
)
def test_changed_inputs_are_made_again_from_nothing(tmp_path, change):
    folder, again = tmp_path / "one", Work()
    key = run_stage(folder, READS, Work())
    (folder / "left over").touch()
    changed = READS | change
    assert run_stage(folder, changed, again) != key
    assert again.made == [0, 1, 2]
    assert contents(tmp_path) == ["one"]
    assert contents(folder) == ["0", "1", "2", KEY_FILE]
    assert run_stage(folder, changed, Work(stop=0))  # would stop if it were made


def test_a_stopped_stage_has_no_folder_and_goes_on_where_it_was(tmp_path, capsys):
    folder, rest = tmp_path / "one", Work()
    stop_after(2, folder, READS)
    assert contents(tmp_path) == ["one.partial"]
    run_stage(folder, READS, rest)
    assert rest.made == [2]
    assert contents(tmp_path) == ["one"]
    assert capsys.readouterr().err.endswith(f"{folder}: going on where it was\n")


def test_what_other_inputs_left_half_made_is_thrown_away(tmp_path):
    folder, work = tmp_path / "one", Work()
    stop_after(2, folder, READS | {"text": "other"})
    run_stage(folder, READS, work)
    assert work.made == [0, 1, 2]


@pytest.mark.parametrize("content", [None, "", '{"key": "', "[]"])
def test_a_half_made_folder_without_a_readable_key_is_thrown_away(tmp_path, content):
    folder, work = tmp_path / "one", Work()
    stop_after(2, folder, READS)
    key_file = tmp_path / "one.partial" / KEY_FILE
    key_file.unlink()
    if content is not None:
        key_file.write_text(content)
    run_stage(folder, READS, work)
    assert work.made == [0, 1, 2]


def test_a_finished_folder_stays_until_its_successor_is_finished(tmp_path):
    folder, again = tmp_path / "one", Work()
    run_stage(folder, READS, Work())
    stop_after(1, folder, READS | {"text": "other"})
    assert contents(tmp_path) == ["one", "one.partial"]
    run_stage(folder, READS, again)
    assert again.made == []


def test_a_discarded_stage_is_made_from_nothing(tmp_path):
    folder, again = tmp_path / "one", Work()
    key = run_stage(folder, READS, Work())
    stop_after(1, folder, READS | {"text": "other"})
    discard(folder)
    assert contents(tmp_path) == []
    assert run_stage(folder, READS, again) == key
    assert again.made == [0, 1, 2]


def test_a_stage_reads_the_key_of_the_one_before(tmp_path):
    def chain(epochs):
        first = run_stage(tmp_path / "first", {"epochs": epochs}, Work())
        second = Work()
        run_stage(tmp_path / "second", {"after": first}, second)
        return second.made

    assert [chain(1), chain(1), chain(2)] == [[0, 1, 2], [], [0, 1, 2]]


@pytest.mark.parametrize("value", [Path("x"), Settings, {1}, np.int64(1)])
def test_an_input_that_has_no_lasting_form_is_refused_before_any_work(tmp_path, value):
    with pytest.raises(TypeError, match="is not part of a stage's inputs"):
        run_stage(tmp_path / "one", {"a": value}, Work())
    assert contents(tmp_path) == []


def test_kill_in_the_middle_and_go_on(tmp_path):
    # The child writes one step, says so, and then hangs inside the stage until it is killed.
    child = """
import sys
from pathlib import Path
from export.stage import run_stage

def make(folder):
    (folder / "0").write_text("step 0")
    print("written", flush=True)
    sys.stdin.read()

run_stage(Path(sys.argv[1]), {"epochs": 3}, make)
"""
    folder, rest = tmp_path / "one", Work()
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", child, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout.readline() == b"written\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert contents(tmp_path) == ["one.partial"]
    run_stage(folder, {"epochs": 3}, rest)
    assert rest.made == [1, 2]
    assert contents(tmp_path) == ["one"]


def test_a_kill_between_the_last_step_and_the_final_name_costs_nothing(tmp_path):
    folder, rest = tmp_path / "one", Work()
    run_stage(folder, READS, Work())
    folder.rename(tmp_path / "one.partial")  # what such a kill leaves
    run_stage(folder, READS, rest)
    assert rest.made == []
    assert contents(tmp_path) == ["one"]


def test_a_fingerprint_follows_contents_and_order_but_not_names(tmp_path):
    one, other, copy = (tmp_path / name for name in "abc")
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    copy.write_bytes(b"one")
    parts = hashlib.sha256(b"one").digest() + hashlib.sha256(b"other").digest()
    assert fingerprint([one, other]) == hashlib.sha256(parts).hexdigest()
    assert fingerprint([copy, other]) == fingerprint([one, other])
    assert fingerprint([other, one]) != fingerprint([one, other])
    one.write_bytes(b"oneo")
    other.write_bytes(b"ther")
    assert fingerprint([one, other]) != fingerprint([copy, other])
