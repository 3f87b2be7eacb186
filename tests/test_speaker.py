import json
import os

import numpy as np
import pytest
from scipy.special import softmax

from edge_ser import AudioError, BundleError, Recognizer
from edge_ser.adaptation import FEATURES, Adaptation, History
from edge_ser.bundle import ADAPTATION
from edge_ser.cli import main
from edge_ser.testing import list_files, make_bundle

RATE = 16_000
TEMPERATURE = 2.0


def adaptation(size=1.0):
    """Return a network that shifts a label down by what its mean logit is above the others'."""
    inner, outer = np.zeros((FEATURES + 1, 1)), np.array([[1.0], [0.0]])
    inner[0] = 1.0
    return Adaptation(inner, outer, np.array([-size]), half=1.0)


@pytest.fixture
def bundle(tmp_path):
    folder = make_bundle(tmp_path / "b", temperature=TEMPERATURE, window_s=1.0, hop_s=0.5)
    (folder / ADAPTATION).write_text(json.dumps(adaptation().to_json()))
    document = json.loads((folder / "metadata.json").read_text())
    document["files"] = list_files(folder, {ADAPTATION})
    (folder / "metadata.json").write_text(json.dumps(document))
    return folder


def clip(level, seconds=0.8):
    return np.full(round(seconds * RATE), level, np.float32)


def test_the_first_answer_is_the_recognizers_own(bundle):
    recognizer = Recognizer.load(bundle)
    assert recognizer.adapt().predict(clip(0.2), RATE) == recognizer.predict(clip(0.2), RATE)


def test_later_answers_are_shifted_by_what_was_heard_before(bundle):
    recognizer = Recognizer.load(bundle)
    speaker, history = recognizer.adapt(), History.empty(3)
    for level in (0.3, 0.1, 0.6, 0.25):
        logits = recognizer.run(clip(level, 1.7), RATE)[1]
        assert len(logits) == 3  # windows
        shifted = logits / TEMPERATURE + adaptation().shift(history)
        found = speaker.predict(clip(level, 1.7), RATE)
        expected = softmax(shifted.astype(np.float64), axis=1).mean(axis=0)
        np.testing.assert_allclose(list(found.probs.values()), expected, atol=1e-6)
        history.add(logits.mean(axis=0) / TEMPERATURE)
    assert np.abs(adaptation().shift(history)).max() > 0.05
    np.testing.assert_allclose(speaker.history.features(), history.features())


def test_nothing_that_follows_changes_an_answer(bundle):
    recognizer = Recognizer.load(bundle)
    one, other = recognizer.adapt(), recognizer.adapt()
    first = [speaker.predict(clip(0.2), RATE) for speaker in (one, other)]
    other.predict(clip(0.9), RATE)
    assert first[0] == first[1]


def test_refused_audio_is_not_remembered(bundle):
    speaker = Recognizer.load(bundle).adapt()
    with pytest.raises(AudioError):
        speaker.predict(clip(0.2, 0.1), RATE)
    assert speaker.history.count == 0


def test_a_speaker_is_saved_known_again_and_forgotten(bundle, tmp_path):
    recognizer = Recognizer.load(bundle)
    speaker = recognizer.adapt()
    speaker.predict(clip(0.2), RATE)
    speaker.save(tmp_path / "anna.json")
    again = recognizer.adapt(tmp_path / "anna.json")
    expected = speaker.predict(clip(0.5), RATE)
    assert again.predict(clip(0.5), RATE) == expected
    assert expected != recognizer.predict(clip(0.5), RATE)
    again.reset()
    assert again.predict(clip(0.5), RATE) == recognizer.predict(clip(0.5), RATE)
    assert (tmp_path / "anna.json").stat().st_size < 2000


def test_a_place_that_cannot_be_written_is_one_line(bundle, tmp_path):
    with pytest.raises(AudioError, match="cannot be written"):
        Recognizer.load(bundle).adapt().save(tmp_path / "no" / "anna.json")


def test_a_bundle_without_adaptation_says_so(tmp_path):
    recognizer = Recognizer.load(make_bundle(tmp_path / "b"))
    with pytest.raises(BundleError, match=r"has no 'adaptation.json'; it cannot adapt"):
        recognizer.adapt()
    with pytest.raises(BundleError, match="was not loaded from a bundle"):
        Recognizer(recognizer.metadata, recognizer.engine).adapt()


def test_a_history_of_another_model_is_refused(bundle, tmp_path):
    recognizer = Recognizer.load(bundle)
    recognizer.adapt().save(tmp_path / "anna.json")
    document = json.loads((tmp_path / "anna.json").read_text())
    (tmp_path / "anna.json").write_text(json.dumps({**document, "adaptation": "0" * 64}))
    with pytest.raises(BundleError, match="made by another model"):
        recognizer.adapt(tmp_path / "anna.json")


def write_clips(folder, levels):
    import soundfile

    files = []
    for number, level in enumerate(levels):
        files.append(str(folder / f"{number}.wav"))
        soundfile.write(files[-1], clip(level), RATE, subtype="FLOAT")
    return files


def test_the_command_learns_from_file_to_file_and_from_run_to_run(bundle, tmp_path, capsys):
    levels = (0.3, 0.1, 0.6)
    files = write_clips(tmp_path, levels)
    command = ["predict", "--bundle", str(bundle), "--json", "--speaker", str(tmp_path / "a.json")]
    assert main([*command, *files[:2]]) == 0
    assert main([*command, files[2]]) == 0
    found = [json.loads(line)["probs"] for line in capsys.readouterr().out.splitlines()]
    speaker = Recognizer.load(bundle).adapt()
    assert found == [speaker.predict(clip(level), RATE).probs for level in levels]


def test_a_place_that_cannot_be_written_is_one_line_before_any_answer(bundle, tmp_path, capsys):
    files = write_clips(tmp_path, (0.3, 0.1))
    command = ["predict", "--bundle", str(bundle), "--speaker", str(tmp_path / "no" / "a.json")]
    assert main([*command, *files]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    assert "cannot be written" in found.err


def test_a_refused_file_is_not_learned_from(bundle, tmp_path, capsys):
    files = write_clips(tmp_path, (0.3,))
    place = str(tmp_path / "a.json")
    command = ["predict", "--bundle", str(bundle), "--speaker", place]
    assert main([*command, files[0], "missing.wav"]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["count"] == 1
    assert "missing.wav" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("no history")
    assert main([*command, files[0]]) == 1
    assert capsys.readouterr().err.startswith("edge-ser: ")
    assert (tmp_path / "a.json").read_text() == "no history"  # nothing of the user's is lost
    assert not os.path.exists(place + ".partial")
