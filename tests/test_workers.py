import os
import time

import pytest
import torch

from export.workers import workers


def process_and_threads(_):
    time.sleep(0.3)  # so that one process does not take all jobs
    return os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize(("cores", "each", "expected"), [(2, 1, 2), (2, 2, 1), (1, 2, 1)])
def test_no_more_processes_than_cores_and_a_thread_each(monkeypatch, cores, each, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with workers(each) as pool:
        found = list(pool.map(process_and_threads, range(6)))
    assert len({process for process, _ in found}) == expected
    assert {threads for _, threads in found} == {1}
