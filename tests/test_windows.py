import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ser.windows import WindowBuffer, windows


def starts_by_definition(length, window, hop):
    starts = [0]
    while starts[-1] + window < length:
        starts.append(starts[-1] + hop)
    return starts


@settings(deadline=None)
@given(
    length=st.integers(1, 500),
    hop=st.integers(1, 50),
    overlap=st.integers(1, 50),
    sizes=st.lists(st.integers(1, 100), min_size=1),
)
def test_windows_cover_every_sample_whatever_the_blocks(length, hop, overlap, sizes):
    window = hop + overlap
    samples = np.arange(length, dtype=np.float32)
    cuts = np.cumsum(sizes)
    blocks = [block for block in np.split(samples, cuts[cuts < length]) if len(block)]
    found = list(windows(blocks, window, hop))
    assert [start for start, _ in found] == starts_by_definition(length, window, hop)
    for start, taken in found:
        np.testing.assert_array_equal(taken, samples[start : start + window])
    assert found[-1][0] + len(found[-1][1]) == length
    assert len(found[-1][1]) > overlap or len(found) == 1


@settings(deadline=None)
@given(
    hop=st.integers(1, 50),
    overlap=st.integers(1, 50),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20),
)
def test_a_window_is_there_as_soon_as_its_last_sample_is(hop, overlap, sizes):
    window, buffer = hop + overlap, WindowBuffer(hop + overlap, hop)
    heard, starts = 0, []
    for size in sizes:
        block = np.arange(heard, heard + size, dtype=np.float32)
        heard += size
        starts += [start for start, _ in buffer.push(block)]
        complete = 0 if heard < window else (heard - window) // hop + 1
        assert starts == [hop * n for n in range(complete)]


def test_a_buffer_begins_anew_after_its_end():
    buffer = WindowBuffer(4, 2)
    for _ in range(2):
        found = [*buffer.push(np.arange(7, dtype=np.float32)), *buffer.finish()]
        assert [(start, len(taken)) for start, taken in found] == [(0, 4), (2, 4), (4, 3)]


def test_a_buffer_holds_less_than_a_window_and_a_block():
    buffer = WindowBuffer(1000, 100)
    for _ in range(50):
        list(buffer.push(np.zeros(300, np.float32)))
        assert len(buffer._held) < 1000
