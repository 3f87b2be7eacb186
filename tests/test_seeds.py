import json
import statistics

import numpy as np
import pytest

from export.corpora import Clip
from export.scores import score
from export.seeds import columns, spread, table


def scores(right):
    """Return real scores of four clips: the first two are right, and ``right`` of the others."""
    clips = [
        Clip("nemo", "nemo", None, label, "1", "", "pl", float(n))
        for n, label in enumerate(("anger", "anger", "fear", "fear"))
    ]
    probs = np.eye(2)[[0, 0, int(right > 0), int(right > 1)]]
    return score(probs, clips, ("anger", "fear"), {"nemo": np.array([True, True])})


@pytest.mark.parametrize(("right", "ua"), [(0, 0.5), (1, 0.75), (2, 1.0)])
def test_the_columns_are_pooled_masked_and_their_mean(right, ua):
    assert columns(scores(right)) == {"pooled": ua, "nemo": ua, "masked mean": ua}


def test_the_spread_is_the_sample_standard_deviation():
    values = [0.5, 0.75, 0.9]
    found = spread(values)
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["sd"] == pytest.approx(statistics.stdev(values))
    assert found["values"] == values


def test_a_single_seed_has_no_spread():
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "values": [0.5]}


def summary(**more):
    def row(*values):
        return {"pooled": spread(values), "nemo": spread([v / 2 for v in values])}

    def adapted(history, utterances, *values):
        return {"history": history, "utterances": utterances, "pooled_ua": spread(values)}

    rows = [
        adapted("none", 0, 0.5, 0.7),
        adapted("balanced", 1, 0.6, 0.7),
        adapted("balanced", 5, 0.7, 0.8),
        adapted("single", 5, 0.5, 0.75),
    ]
    return {
        "recipe": "r",
        "seeds": [0, 2],
        "systems": {"fp32": row(0.5, 0.7)},
        "confidence": {"fp32": {"ece": spread([0.05, 0.07]), "wrong of all": spread([0.5, 0.3])}},
        "adaptation": {"test speakers": rows},
        **more,
    }


def test_the_tables_show_mean_and_deviation():
    lines = table(summary()).splitlines()
    assert lines[0].startswith("r, seeds 0, 2: unweighted accuracy, mean ± standard deviation")
    assert lines[2:5] == [
        "| system | pooled | nemo |",
        "|---|---|---|",
        "| fp32 | 0.600 ± 0.141 | 0.300 ± 0.071 |",
    ]
    assert lines[8:11] == [
        "| system | ece | wrong of all |",
        "|---|---|---|",
        "| fp32 | 0.060 ± 0.014 | 0.400 ± 0.141 |",
    ]
    assert lines[12].endswith("test speakers.")
    assert lines[14:] == [
        "| history | 0 | 1 | 5 |",
        "|---|---|---|---|",
        "| balanced | 0.600 ± 0.141 | 0.650 ± 0.071 | 0.750 ± 0.071 |",
        "| single | 0.600 ± 0.141 |  | 0.625 ± 0.177 |",
    ]


def test_the_table_of_a_baseline_without_chance_has_no_deviation():
    one = summary(systems={"linear_probe": {"pooled": spread([0.5])}})
    assert "| linear_probe | 0.500 |" in table(one).splitlines()


def test_the_table_of_a_student_says_what_it_keeps():
    kept = {"pooled": 0.9312, "masked mean": 0.8349}
    lines = table(summary(kept_of_teacher=kept, teacher_seeds=3)).splitlines()
    assert lines[6] == (
        "INT8 keeps of its teacher's INT8 (3 seeds) 93.1% of its pooled UA and 83.5% of its masked "
        "mean UA."
    )


def test_a_summary_is_json():
    assert json.loads(json.dumps(summary())) == summary()
