from export.front import on_front


def row(ms, mb, ua):
    return {"ms": ms, "mb": mb, "pooled": {"mean": ua}}


def test_the_front_is_what_nothing_as_fast_and_as_small_beats():
    rows = {
        "slow": row(20, 16, 0.70),
        "slower": row(25, 16, 0.69),  # beaten by slow
        "fast": row(2, 3, 0.60),
        "small": row(3, 1, 0.55),  # slower and worse than fast, and smaller
        "large": row(3, 4, 0.60),  # beaten by fast, which is as accurate
        "even": row(2, 3, 0.60),  # the same as fast
        "worst": row(4, 3.5, 0.59),  # beaten by fast
    }
    assert on_front(rows) == ["fast", "even", "small", "slow"]


def test_one_candidate_is_the_front():
    assert on_front({"only": row(1, 1, 0.1)}) == ["only"]
