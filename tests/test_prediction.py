import dataclasses
import json

import pytest

from edge_ser import Prediction, Window

WINDOW = Window(0.0, 1.5, "calm", 0.75, {"calm": 0.75, "loud": 0.25})
PREDICTION = Prediction(
    label="calm",
    confidence=0.75,
    uncertain=False,
    probs={"calm": 0.75, "loud": 0.25},
    windows=(WINDOW,),
    device="cpu",
    graph="model_int8.onnx",
)


def test_to_json_is_plain_data_in_the_documented_order():
    assert json.dumps(PREDICTION.to_json()) == (
        '{"label": "calm", "confidence": 0.75, "uncertain": false, '
        '"probs": {"calm": 0.75, "loud": 0.25}, '
        '"windows": [{"start_s": 0.0, "end_s": 1.5, "label": "calm", "confidence": 0.75, '
        '"probs": {"calm": 0.75, "loud": 0.25}}], "device": "cpu", "graph": "model_int8.onnx"}'
    )


def test_to_json_can_be_read_back_without_a_change():
    assert json.loads(json.dumps(PREDICTION.to_json())) == PREDICTION.to_json()


@pytest.mark.parametrize("answer", [PREDICTION, WINDOW])
def test_answers_are_frozen(answer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.label = "loud"
