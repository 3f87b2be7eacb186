"""What is done in processes that may die. This file imports little: each of them imports it."""

import contextlib
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks.processes import alone, each
from edge_ser.errors import DeviceError, EdgeSerError


def behave(item):
    """Do what an item says, and tell in which process that was."""
    what, number = item
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
    if what == "no device":
        raise DeviceError("there is no GPU\nand no other")
    if what == "fail":
        raise RuntimeError("out of memory\nby far")
    return {"number": number, "process": os.getpid()}


def numbered(*whats):
    return [(what, number) for number, what in enumerate(whats)]


def test_each_failure_costs_its_own_item():
    items = numbered("", "no device", "", "crash", "", "fail", "", "leave", "")
    found = list(each(behave, items, longest_s=60))
    reasons = {n: row["not_measured"] for n, row in enumerate(found) if "not_measured" in row}
    assert reasons == {
        1: "there is no GPU",
        3: "its process died of SIGSEGV",
        5: "RuntimeError: out of memory",
        7: "its process ended with status 3",
    }
    numbers, processes = zip(*(row.values() for row in found if "process" in row), strict=True)
    assert numbers == (0, 2, 4, 6, 8)
    # A device that is not there is no reason for a new process; everything else is one.
    assert processes[0] == processes[1]
    assert len(set(processes)) == 4


def test_what_takes_too_long_is_given_up():
    first, second, third = each(behave, numbered("", "hang", ""), longest_s=6)
    assert second == {"not_measured": "given up after 6 s"}
    assert (first["number"], third["number"]) == (0, 2)


def test_what_is_done_is_told_at_once_and_who_stops_asking_ends_the_process():
    asked = each(behave, numbered("", "hang"), longest_s=600)
    process = next(asked)["process"]
    asked.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def hang(file):
    file.write_text(str(os.getpid()))
    time.sleep(600)


def hang_alone(file):
    alone(hang, file)


def hang_as_an_item(file):
    next(each(hang, [file], longest_s=600))


@pytest.mark.parametrize("begin", [hang_alone, hang_as_an_item])
def test_no_process_outlives_the_one_that_measures(begin, tmp_path):
    file = tmp_path / "process"
    measuring = get_context("spawn").Process(target=begin, args=(file,))
    measuring.start()
    wait_for(lambda: file.exists() and file.read_text())
    os.kill(measuring.pid, signal.SIGKILL)
    measuring.join()
    try:
        wait_for(lambda: not running(int(file.read_text())))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


def running(process):
    """Return whether a process has not ended; one that nobody has waited for has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_alone_is_the_result_or_one_line():
    assert alone(behave, ("", 5))["number"] == 5
    with pytest.raises(EdgeSerError, match=r"^RuntimeError: out of memory$"):
        alone(behave, ("fail", 0))
    with pytest.raises(EdgeSerError, match=r"^its process died"):
        alone(behave, ("leave", 0))
