import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from export.corpora import (
    Clip,
    describe,
    family,
    label_mask,
    load_corpora,
    read_corpus,
    read_samples,
    select,
)
from export.errors import CorpusError

SEVEN = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
HEADER = "path,emotion,speaker,gender,language,duration_s,transcript"


def make_corpus(root, name, *rows, header=HEADER):
    folder = root / name
    folder.mkdir()
    for row in rows:
        (folder / row.split(",")[0]).touch()
    (folder / "manifest.csv").write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return folder


def clip(corpus, emotion, speaker="1", language="en"):
    return Clip(corpus, family(corpus), Path("a.flac"), emotion, speaker, "", language, 1.0)


def test_a_manifest_row_becomes_a_clip(tmp_path):
    folder = make_corpus(tmp_path, "emodb_2s", "a.flac,anger,03,m,de,1.898,Zuhören!")
    expected = Clip("emodb_2s", "emodb", folder / "a.flac", "anger", "03", "m", "de", 1.898)
    assert read_corpus(folder) == (expected,)
    assert expected.speaker_key == "emodb/03"


def test_a_corpus_that_is_not_known_is_its_own_family(tmp_path):
    folder = make_corpus(tmp_path, "mine", "a.flac,anger,1,,en,1,")
    assert read_corpus(folder)[0].speaker_key == "mine/1"


GOOD = "a.flac,anger,1,f,en,1.0,"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ((), HEADER, "holds no clips"),
        ((GOOD,), HEADER.replace("speaker", "who"), "no column 'speaker', needed are ('path', "),
        ((GOOD, "b.flac,anger"), HEADER, "line 3: more or fewer fields than the header has"),
        ((GOOD + ",more",), HEADER, "line 2: more or fewer fields than the header has"),
        (("a.flac,,1,f,en,1.0,",), HEADER, "line 2: 'emotion' is blank"),
        (("a.flac,anger, ,f,en,1.0,",), HEADER, "line 2: 'speaker' is blank"),
        (("a.flac,anger,1,x,en,1.0,",), HEADER, "gender 'x', allowed are 'f', 'm' and blank"),
        (("a.flac,anger,1,f,en,long,",), HEADER, "duration_s 'long' is not a positive number"),
        (("a.flac,anger,1,f,en,0,",), HEADER, "duration_s '0' is not a positive number"),
        (("a.flac,anger,1,f,en,nan,",), HEADER, "duration_s 'nan' is not a positive number"),
        (("a.flac,anger,1,f,en,inf,",), HEADER, "duration_s 'inf' is not a positive number"),
        ((GOOD, GOOD), HEADER, "'a.flac' stands in 2 rows"),
        ((GOOD, "./" + GOOD), HEADER, "'a.flac' stands in 2 rows"),
        (('a.flac,"anger',), HEADER, "not a UTF-8 CSV file"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path, rows, header, message):
    with pytest.raises(CorpusError) as fault:
        read_corpus(make_corpus(tmp_path, "mine", *rows, header=header))
    assert message in str(fault.value)
    assert str(tmp_path / "mine" / "manifest.csv") in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("path", ["../b.flac", "x/../../mine2/b.flac", "/etc/hostname"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    folder = make_corpus(tmp_path, "mine")
    (tmp_path / "b.flac").touch()
    (folder / "manifest.csv").write_text(f"{HEADER}\n{path},anger,1,f,en,1,\n")
    with pytest.raises(CorpusError, match=f"path '{path}' leaves the corpus' folder"):
        read_corpus(folder)


def test_a_missing_file_is_named(tmp_path):
    folder = make_corpus(tmp_path, "mine", GOOD)
    (folder / "a.flac").unlink()
    with pytest.raises(CorpusError, match=r"line 2: 'a\.flac' is not a file of the corpus"):
        read_corpus(folder)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"manifest\.csv: cannot be read \(No such file"):
        read_corpus(tmp_path)


def test_a_manifest_in_another_encoding_is_refused(tmp_path):
    folder = make_corpus(tmp_path, "mine", GOOD)
    (folder / "manifest.csv").write_bytes(f"{HEADER}\n{GOOD}über\n".encode("latin-1"))
    with pytest.raises(CorpusError, match="not a UTF-8 CSV file"):
        read_corpus(folder)


def test_corpora_load_in_the_order_of_their_names(tmp_path):
    make_corpus(tmp_path, "a", "1.flac,anger,1,f,en,1,", "0.flac,fear,1,f,en,1,")
    make_corpus(tmp_path, "b", "2.flac,anger,1,f,en,1,")
    clips = load_corpora(tmp_path, ["b", "a"])
    assert [one.path.name for one in clips] == ["2.flac", "1.flac", "0.flac"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["c"], "no corpus 'c' in {root}, there are ['a', 'b']"),
        (["../a"], "no corpus '../a' in {root}, there are ['a', 'b']"),
        (["a", "a"], "corpora ['a', 'a'], allowed are one or more of ['a', 'b'], each once"),
        ([], "corpora [], allowed are one or more of ['a', 'b'], each once"),
    ],
)
def test_unknown_and_repeated_corpora_are_refused(tmp_path, names, message):
    make_corpus(tmp_path, "a", GOOD)
    make_corpus(tmp_path, "b", GOOD)
    (tmp_path / "not_a_corpus").mkdir()
    with pytest.raises(CorpusError) as fault:
        load_corpora(tmp_path, names)
    assert str(fault.value) == message.format(root=tmp_path)


def test_calm_is_neutral_only_where_the_recipe_merges_it():
    clips = (clip("x", "calm"), clip("x", "neutral"), clip("x", "calm", "2"))
    plain = select(clips, ["neutral"])
    assert [one.emotion for one in plain.clips] == ["neutral"]
    assert plain.dropped == {("x", "calm"): 2}
    merged = select(clips, ["neutral"], {"calm": "neutral"})
    assert [one.emotion for one in merged.clips] == ["neutral"] * 3
    assert merged.dropped == {}
    assert clips[0].emotion == "calm"


def test_levels_are_no_emotions_even_where_a_name_agrees():
    clips = [clip("baved", level) for level in ("low", "neutral", "high")] + [clip("x", "neutral")]
    selection = select(clips, ["neutral"])
    assert [one.corpus for one in selection.clips] == ["x"]
    assert selection.dropped == {("baved", level): 1 for level in ("low", "neutral", "high")}
    assert len(select(clips, ["low", "neutral", "high"]).clips) == 4


def test_a_label_without_a_clip_is_an_error():
    with pytest.raises(CorpusError, match=r"no clip has the label 'fear' in the corpora \['x'\]"):
        select([clip("x", "anger")], ["anger", "fear"])


@pytest.mark.parametrize("merge", [{"anger": "neutral"}, {"calm": "bliss"}])
def test_a_merge_from_a_label_or_to_none_is_refused(merge):
    with pytest.raises(CorpusError, match="allowed is from an emotion that is no label to one of"):
        select([clip("x", "anger"), clip("x", "neutral")], ["anger", "neutral"], merge)


def test_a_mask_tells_what_each_corpus_has():
    clips = [clip("x", "anger"), clip("y", "fear"), clip("x", "fear")]
    masks = label_mask(clips, ["anger", "disgust", "fear"])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "x": [True, False, True],
        "y": [False, False, True],
    }
    assert masks["x"].dtype == np.bool_


def test_corpora_are_described_once_each():
    clips = [clip("nemo", "anger", language="pl"), clip("x", "fear"), clip("x", "anger")]
    nemo, other = describe(clips)
    assert nemo["licence"] == "CC BY-NC-SA 4.0"
    assert nemo["language"] == "pl"
    assert "LREC-COLING 2024" in nemo["source"]
    assert other == {
        "name": "x",
        "language": "en",
        "licence": "not known",
        "source": "not known",
    }


def test_samples_are_mono_float32_at_the_rate(tmp_path):
    stereo = np.stack([np.full(8000, 0.5), np.full(8000, 0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 8000, subtype="FLOAT")
    one = Clip("x", "x", tmp_path / "a.wav", "anger", "1", "", "en", 1.0)
    at_rate = read_samples(one, 8000)
    assert at_rate.dtype == np.float32
    np.testing.assert_array_equal(at_rate, np.full(8000, 0.375, np.float32))
    doubled = read_samples(one, 16000)
    assert doubled.dtype == np.float32
    assert doubled.shape == (16000,)
    np.testing.assert_allclose(doubled[4000:12000], 0.375, atol=1e-4)


# Files and speakers as the README of the corpora gives them.
EXPECTED = {
    "emodb": (277, 8),
    "emodb_2s": (428, 8),
    "ravdess": (1139, 19),
    "urdu": (314, 20),
    "baved": (465, 46),
    "nemo": (226, 7),
    "turev": (345, 5),
}


@pytest.fixture(scope="module")
def clips():
    if "EDGE_SER_CORPORA" not in os.environ:
        pytest.skip("EDGE_SER_CORPORA does not name the folder of the real corpora")
    return load_corpora(Path(os.environ["EDGE_SER_CORPORA"]), list(EXPECTED))


@pytest.mark.corpora
def test_counts_are_those_of_the_readme(clips):
    files = Counter(one.corpus for one in clips)
    speakers = Counter(corpus for corpus, _ in {(one.corpus, one.speaker) for one in clips})
    assert {name: (files[name], speakers[name]) for name in files} == EXPECTED


@pytest.mark.corpora
def test_durations_are_those_of_the_files(clips):
    for one in clips:
        info = soundfile.info(one.path)
        assert (info.samplerate, info.channels) == (16000, 1)
        assert info.frames / 16000 == pytest.approx(one.duration_s, abs=6e-4)


@pytest.mark.corpora
def test_the_seven_labels_leave_boredom_and_the_levels_out(clips):
    selection = select(clips, SEVEN, {"calm": "neutral"})
    assert selection.dropped == {
        ("emodb_2s", "boredom"): 65,
        ("baved", "neutral"): 177,
        ("baved", "high"): 161,
        ("baved", "low"): 127,
    }
    neutral = Counter(one.corpus for one in selection.clips if one.emotion == "neutral")
    assert neutral["ravdess"] == 152 + 76
    assert neutral["turev"] == 80


@pytest.mark.corpora
def test_a_clip_decodes_to_its_duration(clips):
    for corpus in EXPECTED:
        one = next(one for one in clips if one.corpus == corpus)
        samples = read_samples(one, 16000)
        assert len(samples) / 16000 == pytest.approx(one.duration_s, abs=6e-4)
        assert 0 < np.abs(samples).max() <= 1
