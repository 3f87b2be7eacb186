import dataclasses
import errno
import logging
import multiprocessing
import os
import resource
import time

import pytest

from edge_ser.engines.plans import Key, building, cache_folder, digest, read, write
from edge_ser.errors import EngineError

KEY = Key("ab" * 32, "int8", 1, 48_000, "tensorrt 10.3.0", "Orin", "8.7")
PLAN = bytes(range(256)) * 40 + b"\n{}\n"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder() / KEY.file


def test_what_was_kept_is_found_again(file, tmp_path, caplog):
    assert read(file, KEY) is None
    write(file, KEY, PLAN)
    assert read(file, KEY) == PLAN
    assert not caplog.records
    assert file == tmp_path / "edge_ser/engines/abababababababab-int8-1x48000.plan"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [found.name for found in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("graph_sha256", "ab" * 31 + "cd"),
        ("precision", "fp16"),
        ("batch", 8),
        ("samples", 16_000),
        ("tensorrt", "tensorrt 10.16.2"),
        ("gpu", "Thor"),
        ("compute_capability", "11.0"),
    ],
)
def test_every_part_of_the_key_counts(file, caplog, name, value):
    write(file, KEY, PLAN)
    assert {field.name for field in dataclasses.fields(Key)} >= {name}
    assert read(file, dataclasses.replace(KEY, **{name: value})) is None
    (line,) = caplog.messages
    old = getattr(KEY, name)
    assert line.endswith(f"is for {name} {old!r}, needed is {value!r}: it is built again")


def test_all_parts_of_the_key_were_tried():
    (marks,) = (
        mark for mark in test_every_part_of_the_key_counts.pytestmark if mark.name == "parametrize"
    )
    assert [name for name, _ in marks.args[1]] == [f.name for f in dataclasses.fields(Key)]


@pytest.mark.parametrize("size", [0, 1, 40, 250, 300, 5000, -1])
def test_a_cut_off_file_is_built_again(file, caplog, size):
    write(file, KEY, PLAN)
    file.write_bytes(file.read_bytes()[:size])
    assert read(file, KEY) is None
    (line,) = caplog.messages
    assert "is damaged" in line


@pytest.mark.parametrize("place", [5, -1, -6000])
def test_a_changed_byte_is_seen(file, place):
    write(file, KEY, PLAN)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    assert read(file, KEY) is None


@pytest.mark.parametrize("header", [b"[1]\n", b"null\n", b"{}\n", b"\xff\n"])
def test_another_header_is_no_traceback(file, caplog, header):
    file.write_bytes(header + PLAN)
    file.chmod(0o600)
    assert read(file, KEY) is None
    (line,) = caplog.messages
    assert "is damaged" in line or "is for graph_sha256 None" in line


def test_what_others_can_write_is_not_read(file, caplog):
    write(file, KEY, PLAN)
    file.chmod(0o620)
    assert read(file, KEY) is None
    assert "can be written by others: it is built again" in caplog.text


def test_a_foreign_owner_is_not_trusted(file, caplog, monkeypatch):
    write(file, KEY, PLAN)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert read(file, KEY) is None
    assert f"belongs to another user (uid {mine}): it is built again" in caplog.text
    with pytest.raises(EngineError, match=r"belongs to another user .* set XDG_CACHE_HOME"):
        cache_folder()


def test_a_link_is_not_followed(file, caplog):
    write(file, KEY, PLAN)
    real = file.rename(file.with_name("elsewhere"))
    file.symlink_to(real)
    assert read(file, KEY) is None
    assert "cannot be read" in caplog.text
    write(file, KEY, PLAN)  # replaces the link, not what it points to
    assert not file.is_symlink() and read(file, KEY) == PLAN


def test_a_folder_that_others_can_write_is_refused(file):
    file.parent.chmod(0o770)
    with pytest.raises(EngineError, match="can be written by others, and engines are machine code"):
        cache_folder()


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "edge_ser").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        EngineError, match=r"cannot be made \(Not a directory\); set XDG_CACHE_HOME"
    ):
        cache_folder()


def _fill(file):
    logging.getLogger("edge_ser").addHandler(handler := _Lines())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
    write(file, KEY, PLAN)
    return handler.lines


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_a_full_disk_loses_the_file_and_nothing_else(file):
    """A process with a limit on the size of its files has a disk that is full."""
    write(file, KEY, b"former")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (line,) = pool.apply(_fill, (file,))
    assert f"({os.strerror(errno.EFBIG)}): it works, and is built again next time" in line
    assert read(file, KEY) == b"former"
    assert [found.name for found in file.parent.iterdir()] == [file.name]


def _build(file, log, seconds):
    with building(file):
        if read(file, KEY) is None:
            with log.open("a") as stream:
                stream.write("built\n")
            time.sleep(seconds)
            write(file, KEY, PLAN)
    return read(file, KEY) == PLAN


def test_of_two_processes_one_builds(file, tmp_path):
    log = tmp_path / "log"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_build, [(file, log, 0.5)] * 3) == [True] * 3
    assert log.read_text() == "built\n"


def test_a_builder_that_was_killed_leaves_no_lock(file):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build, args=(file, file.parent / "log", 60))
    process.start()
    while not (file.parent / "log").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert _build(file, file.parent / "log", 0)


def test_the_digest_knows_the_order():
    assert digest(["a", "b"]) != digest(["b", "a"]) != digest(["ab"])
