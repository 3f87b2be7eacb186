import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_ser import Recognizer
from edge_ser.bundle import Metadata
from edge_ser.testing import FakeEngine
from export.augment import Augmentation
from export.corpora import load_corpora
from export.recipe import Windows
from export.views import SHARD, Cutting, load_views, make_views, view_windows
from tests.speech_corpus import make_corpora, slow_sum

CUTTING = Cutting(16000, Windows(0.7, 0.2), Augmentation())
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"), {"mine": map(str, range(7))})


@pytest.fixture(scope="module")
def clips(corpora):
    return load_corpora(corpora, ["mine"])


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    make_views(folder, clips, numbers(clips), CUTTING, slow_sum)
    return folder


def numbers(clips):
    """Return how many augmented views a clip has: 0, 1, 2, 0, 1, ..."""
    return [place % 3 for place in range(len(clips))]


def test_view_0_is_what_the_runtime_gives_to_the_engine(clips):
    engine = FakeEngine([0.0, 0.0])
    metadata = Metadata(
        name="m", labels=("a", "b"), sample_rate_hz=16000, window_s=0.7, hop_s=0.2,
        temperature=1.0, abstain_below=0.0, certified=True, encoder={}, head={}, teacher=None,
        corpora=(), tools={}, files={},
    )  # fmt: skip
    longest = max(clips, key=lambda clip: clip.duration_s)
    for clip in (longest, *clips[:5]):
        engine.calls.clear()
        Recognizer(metadata, engine).predict(clip.path)
        found = list(view_windows(clip, 0, CUTTING))
        assert len(found) == len(engine.calls)
        for samples, (call,) in zip(found, engine.calls, strict=True):
            np.testing.assert_array_equal(samples, call)
    assert len(list(view_windows(longest, 0, CUTTING))) >= 3


def test_a_view_depends_on_the_clip_and_its_number_only(clips):
    first = [list(view_windows(clips[3], number, CUTTING)) for number in (1, 2)]
    list(view_windows(clips[4], 5, CUTTING))
    np.random.default_rng(0).random(9)
    second = [list(view_windows(clips[3], number, CUTTING)) for number in (2, 1)][::-1]
    for (one,), (other,) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first[0][0], first[1][0])


def test_two_clips_are_augmented_differently(clips):
    gain_only = dict.fromkeys(
        ("stretch", "pitch", "crop", "shift", "room", "noise", "telephone"), 0
    )
    cutting = Cutting(16000, Windows(4.0, 1.0), Augmentation(**gain_only, gain=1.0))
    gains = []
    for clip in clips[:6]:
        (plain,), (louder,) = (list(view_windows(clip, n, cutting)) for n in (0, 1))
        gains.append(round(float(np.abs(louder).max() / np.abs(plain).max()), 6))
    assert len(set(gains)) == 6


def test_an_augmented_view_is_one_window_at_most(clips):
    for number in range(1, 8):
        (samples,) = view_windows(clips[0], number, CUTTING)
        assert samples.dtype == np.float32
        assert 6400 <= len(samples) <= 11200


def test_views_hold_what_was_computed_by_clip_and_number(made, clips):
    views = load_views(made)
    assert sorted({(view.clip, view.number) for view in views}) == [
        (clip, number) for clip, most in enumerate(numbers(clips)) for number in range(most + 1)
    ]
    for clip in (0, 17, len(clips) - 1):
        expected = list(view_windows(clips[clip], 0, CUTTING))
        found = [view.arrays for view in views if (view.clip, view.number) == (clip, 0)]
        assert len(found) == len(expected)
        for arrays, samples in zip(found, expected, strict=True):
            np.testing.assert_array_equal(arrays["samples"], samples)
            assert arrays["sum"] == samples.sum(dtype=np.float64)


def test_views_come_in_the_order_of_clips_numbers_and_windows(made):
    order = [(view.clip, view.number) for view in load_views(made)]
    assert order == sorted(order)


def noted_sum(folder):
    """Return `slow_sum`, and leave a file that tells of it."""
    (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    return slow_sum()


def test_a_process_loads_once_however_many_files_it_makes(clips, made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for name in ("views", "loads"):
        (tmp_path / name).mkdir()
    load = partial(noted_sum, tmp_path / "loads")
    make_views(tmp_path / "views", clips, numbers(clips), CUTTING, load)
    assert len(list((tmp_path / "views").iterdir())) > 2
    assert len(list((tmp_path / "loads").iterdir())) == 1
    assert_equal(made, tmp_path / "views")


def assert_equal(made, again):
    names = sorted(file.name for file in made.glob("*.npz"))
    assert names == sorted(file.name for file in again.glob("*.npz"))
    for name in names:
        with np.load(made / name) as one, np.load(again / name) as other:
            assert one.files == other.files
            for key in one.files:
                np.testing.assert_array_equal(one[key], other[key])


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)


def start_slowly(corpora, folder, delay_s):
    """Make the views in a process of its own, in a group of its own."""
    script = (
        "import sys\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from export.corpora import load_corpora\n"
        "from export.views import make_views\n"
        "from tests.speech_corpus import slow_sum\n"
        "from tests.test_views import CUTTING, numbers\n"
        "if __name__ == '__main__':\n"
        "    clips = load_corpora(Path(sys.argv[1]), ['mine'])\n"
        "    load = partial(slow_sum, float(sys.argv[3]))\n"
        "    make_views(Path(sys.argv[2]), clips, numbers(clips), CUTTING, load)\n"
    )
    file = folder.with_suffix(".py")
    file.write_text(script)
    return subprocess.Popen(
        [sys.executable, file, corpora, folder, str(delay_s)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_a_killed_run_goes_on_and_keeps_what_is_finished(corpora, clips, made, tmp_path):
    folder = tmp_path / "views"
    folder.mkdir()
    process = start_slowly(corpora, folder, 0.05)
    try:
        wait_for(lambda: any(folder.glob("*.npz")), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        finished = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
        assert 1 <= len(finished) < len(list(made.glob("*.npz")))
        make_views(folder, clips, numbers(clips), CUTTING, slow_sum)
        assert_equal(made, folder)
        assert {file: file.stat().st_mtime_ns for file in finished} == finished
        assert not list(folder.glob("*.partial"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_finished_folder_is_left_alone(clips, made):
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    make_views(made, clips, numbers(clips), CUTTING, partial(slow_sum, 1e9))
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == before


def test_the_clips_need_more_than_two_files(clips):
    assert len(clips) > 2 * SHARD
