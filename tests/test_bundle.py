import dataclasses
import json
import os
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ser import BundleError, bundle
from edge_ser.bundle import Bundle
from edge_ser.external_data import external_files
from edge_ser.metadata import BundleFile, Metadata
from edge_ser.testing import list_files, make_bundle

MISSING = object()


@pytest.fixture
def folder(tmp_path):
    return make_bundle(tmp_path / "b", fp32=True)


def edit(folder, **changes):
    """Change metadata.json as a text editor would; MISSING takes a key out."""
    document = {**json.loads((folder / "metadata.json").read_text()), **changes}
    kept = {key: value for key, value in document.items() if value is not MISSING}
    (folder / "metadata.json").write_text(json.dumps(kept))


def refusal(folder):
    with pytest.raises(BundleError) as error:
        Bundle.open(folder)
    return str(error.value)


# Opening


def test_opening_reads_every_field(folder):
    edit(folder, temperature=1.5, corpora=[{"name": "emodb", "language": "de"}], teacher={"a": 1})
    opened = Bundle.open(str(folder))
    assert opened.path == folder
    metadata = opened.metadata
    assert metadata.labels == ("calm", "lively", "loud")
    assert (metadata.sample_rate_hz, metadata.window_s, metadata.hop_s) == (16_000, 3.0, 1.5)
    assert (metadata.temperature, metadata.abstain_below) == (1.5, 0.0)
    assert metadata.corpora == ({"name": "emodb", "language": "de"},)
    assert metadata.teacher == {"a": 1}


def test_unlisted_files_are_ignored(folder):
    (folder / "notes.txt").write_text("mine")
    Bundle.open(folder)


def test_an_optional_file_may_be_absent(folder):
    (folder / "model.onnx").unlink()
    Bundle.open(folder)


def test_embedded_bundles_are_found_by_name_before_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MODELS", tmp_path / "models")
    make_bundle(tmp_path / "models" / "small", labels=("yes", "no"))
    make_bundle(tmp_path / "small", labels=("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert Bundle.open("small").metadata.labels == ("yes", "no")
    assert Bundle.open("./small").metadata.labels == ("a", "b")
    assert Bundle.open(Path("small")).metadata.labels == ("a", "b")


def test_an_unknown_name_lists_the_embedded_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MODELS", tmp_path)
    make_bundle(tmp_path / "default")
    make_bundle(tmp_path / "tiny")
    line = "no bundle 'tinny'; allowed: a folder, or an embedded one (default, tiny)"
    assert refusal("tinny") == line


# Faults of the files


def test_no_metadata(folder):
    (folder / "metadata.json").unlink()
    assert refusal(folder) == f"bundle '{folder}' has no readable metadata.json"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_metadata_that_is_not_json(folder, content, reason):
    (folder / "metadata.json").write_bytes(content)
    assert refusal(folder) == f"bundle '{folder}': metadata.json is not JSON ({reason})"


def test_metadata_that_is_nested_too_deeply(folder):
    (folder / "metadata.json").write_text("[" * 10**6)
    assert refusal(folder).startswith(f"bundle '{folder}': metadata.json is not JSON (maximum")


@pytest.mark.parametrize("name", ["model_int8.bin", "model_int8.onnx", "selftest.npz", "README.md"])
def test_a_changed_byte(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    line = f"'{folder / name}' was changed: its SHA-256 is not the listed one; get a complete copy"
    assert refusal(folder) == line


def test_a_missing_required_file(folder):
    (folder / "model_int8.bin").unlink()
    assert refusal(folder) == f"bundle '{folder}' has no 'model_int8.bin'; get a complete copy"


@pytest.mark.parametrize(
    "name", ["../b/README.md", "/etc/hostname", "a/b", "..\\x", "C:x", "..", ".", ""]
)
def test_a_path_that_leaves_the_bundle(folder, name):
    files = json.loads((folder / "metadata.json").read_text())["files"]
    edit(folder, files={**files, name: {"sha256": "0" * 64, "required": True}})
    assert refusal(folder) == (
        f"bundle '{folder}': metadata.json: files has {name!r}; "
        "allowed: plain names inside the bundle"
    )


def test_a_link_that_leaves_the_bundle(folder):
    os.rename(folder / "README.md", folder.parent / "README.md")
    os.symlink("../README.md", folder / "README.md")
    assert refusal(folder) == (
        f"'{folder / 'README.md'}' is a link that leaves the bundle; copy the file in"
    )


# Faults of the metadata

ENTRY = 'allowed: {"sha256": 64 hex digits, "required": true or false}'
KEYS = (
    "abstain_below, certified, corpora, encoder, files, head, hop_s, labels, name, sample_rate_hz, "
    "schema_version, teacher, temperature, tools, window_s"
)
FAULTS = [
    ({"schema_version": 2}, "schema_version is 2; allowed: 1"),
    ({"schema_version": "1"}, "schema_version is '1'; allowed: 1"),
    ({"schema_version": MISSING}, "schema_version is None; allowed: 1"),
    ({"labels": MISSING, "head": MISSING}, "missing: head, labels"),
    ({"gain": 1}, f"unknown: 'gain'; allowed: {KEYS}"),
    ({"name": ""}, "name is ''; allowed: a text"),
    ({"name": 7}, "name is 7; allowed: a text"),
    ({"labels": []}, "labels is (); allowed: two or more different texts"),
    ({"labels": ["a"]}, "labels is ('a',); allowed: two or more different texts"),
    ({"labels": ["a", "a"]}, "labels is ('a', 'a'); allowed: two or more different texts"),
    ({"labels": ["a", " "]}, "labels is ('a', ' '); allowed: two or more different texts"),
    ({"labels": ["a", 1]}, "labels is ('a', 1); allowed: two or more different texts"),
    ({"labels": ["a", []]}, "labels is ('a', []); allowed: two or more different texts"),
    ({"labels": "ab"}, "labels is 'ab'; allowed: two or more different texts"),
    ({"sample_rate_hz": 3999}, "sample_rate_hz is 3999; allowed: a whole number, 4000 to 192000"),
    (
        {"sample_rate_hz": 16e3},
        "sample_rate_hz is 16000.0; allowed: a whole number, 4000 to 192000",
    ),
    ({"window_s": 0.39}, "window_s is 0.39; allowed: a number, 0.4 to 60"),
    ({"window_s": "3"}, "window_s is '3'; allowed: a number, 0.4 to 60"),
    ({"window_s": True}, "window_s is True; allowed: a number, 0.4 to 60"),
    ({"window_s": float("inf")}, "window_s is inf; allowed: a number, 0.4 to 60"),
    ({"hop_s": -1}, "hop_s is -1; allowed: a number, 0.01 to 60"),
    ({"hop_s": 10**400}, f"hop_s is {10**400}; allowed: a number, 0.01 to 60"),
    ({"hop_s": 2.7}, "hop_s is 2.7; allowed: window_s - 0.4 or less"),
    ({"temperature": 0}, "temperature is 0; allowed: a number, 0.01 to 100"),
    ({"temperature": float("nan")}, "temperature is nan; allowed: a number, 0.01 to 100"),
    ({"abstain_below": 1.01}, "abstain_below is 1.01; allowed: a number, 0 to 1"),
    ({"abstain_below": -0.1}, "abstain_below is -0.1; allowed: a number, 0 to 1"),
    ({"certified": 1}, "certified is 1; allowed: true or false"),
    ({"abstain_below": None}, "abstain_below is None; allowed: a number, 0 to 1"),
    ({"encoder": None}, "encoder is None; allowed: an object"),
    ({"head": "cnn"}, "head is 'cnn'; allowed: an object"),
    ({"teacher": "big"}, "teacher is 'big'; allowed: an object or null"),
    ({"corpora": ["emodb"]}, "corpora is ('emodb',); allowed: a list of objects of texts"),
    ({"corpora": {}}, "corpora is {}; allowed: a list of objects of texts"),
    ({"tools": {"torch": 2}}, "tools is {'torch': 2}; allowed: an object of texts"),
    ({"files": {}}, "files is {}; allowed: an object with an entry for each file"),
    ({"files": []}, "files is []; allowed: an object with an entry for each file"),
    ({"files": {"a": "b"}}, f"files has 'a': 'b'; {ENTRY}"),
    ({"files": {"a": {"sha256": "0"}}}, f"files has 'a': {{'sha256': '0'}}; {ENTRY}"),
    (
        {"files": {"a": {"sha256": "0", "required": True}}},
        f"files has 'a': {{'sha256': '0', 'required': True}}; {ENTRY}",
    ),
    (
        {"files": {"a": {"sha256": "0" * 64, "required": 1}}},
        f"files has 'a': {{'sha256': '{'0' * 64}', 'required': 1}}; {ENTRY}",
    ),
]


@pytest.mark.parametrize(("changes", "line"), FAULTS, ids=[line for _, line in FAULTS])
def test_a_fault_of_the_metadata_has_one_exact_line(folder, changes, line):
    edit(folder, **changes)
    assert refusal(folder) == f"bundle '{folder}': metadata.json: {line}"


def test_metadata_that_is_not_an_object(folder):
    (folder / "metadata.json").write_text("[1]")
    line = f"bundle '{folder}': metadata.json: it holds a list; allowed: an object"
    assert refusal(folder) == line


def test_the_last_window_may_be_as_short_as_four_tenths_of_a_second(folder):
    edit(folder, window_s=1.5, hop_s=1.1)  # as floats they differ by less than 0.4
    assert Bundle.open(folder).metadata.hop_s == 1.1


numbers = st.integers(1, 100) | st.floats(0.01, 100)
texts = st.text(min_size=1).filter(str.strip)
json_objects = st.dictionaries(st.text(), st.none() | st.booleans() | st.text() | st.lists(numbers))
metadatas = st.builds(
    Metadata,
    name=texts,
    labels=st.lists(texts, min_size=2, unique=True).map(tuple),
    sample_rate_hz=st.integers(4_000, 192_000),
    window_s=st.floats(1.5, 10),
    hop_s=st.floats(0.1, 1),
    temperature=numbers,
    abstain_below=st.floats(0, 1),
    encoder=json_objects,
    head=json_objects,
    teacher=st.none() | json_objects,
    corpora=st.lists(st.dictionaries(st.text(), st.text())).map(tuple),
    tools=st.dictionaries(st.text(), st.text()),
    files=st.just({"a": BundleFile("0" * 64, True), "b": BundleFile("1" * 64, False)}),
)


@given(metadatas)
@settings(max_examples=50)
def test_metadata_survives_json(metadata):
    assert Metadata.from_json(json.loads(json.dumps(metadata.to_json()))) == metadata


def test_metadata_made_in_python_is_checked_too(folder):
    metadata = Bundle.open(folder).metadata
    with pytest.raises(BundleError) as error:
        dataclasses.replace(metadata, temperature=-1.0)
    assert str(error.value) == "temperature is -1.0; allowed: a number, 0.01 to 100"


# Which graph


@pytest.mark.parametrize(
    ("precision", "machine", "name"),
    [
        ("int8", "x86_64", "model_int8_x86.onnx"),
        ("int8", "AMD64", "model_int8_x86.onnx"),
        ("int8", "aarch64", "model_int8.onnx"),
        ("int8", "arm64", "model_int8.onnx"),
        ("fp32", "x86_64", "model.onnx"),
        ("fp32", "aarch64", "model.onnx"),
    ],
)
def test_the_graph_for_a_precision_and_a_processor(folder, precision, machine, name):
    assert Bundle.open(folder).graph(precision, machine) == folder / name


def test_an_unknown_precision(folder):
    with pytest.raises(BundleError) as error:
        Bundle.open(folder).graph("fp64")
    assert str(error.value) == "precision is 'fp64'; allowed: 'int8', 'fp32'"


@pytest.mark.parametrize("listed", [True, False])
def test_a_missing_full_precision_graph_says_where_to_get_it(tmp_path, listed):
    folder = make_bundle(tmp_path, fp32=listed)
    (folder / "model.onnx").unlink(missing_ok=True)
    with pytest.raises(BundleError) as error:
        Bundle.open(folder).graph("fp32")
    assert str(error.value) == (
        f"bundle '{folder}' has no 'model.onnx'; "
        "export it with `python -m export run RECIPE`, or use int8"
    )


# Weights outside the graph


def with_location(folder, location, nested=False):
    """Point the external weights of model_int8.onnx somewhere else, and list it as it is then."""
    model = onnx.load(folder / "model_int8.onnx", load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.external_data]
    tensor.external_data[0].value = location
    if nested:  # the same in a Constant of a branch
        constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
        branch = onnx.helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch))
        model.graph.initializer.remove(tensor)
    (folder / "model_int8.onnx").write_bytes(model.SerializeToString())
    edit(folder, files=list_files(folder, {"model.onnx"}))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "other"])
def test_weights_come_from_listed_files_only(folder, location, nested):
    (folder.parent / "w.bin").write_bytes(bytes(12))
    with_location(folder, location, nested)
    with pytest.raises(BundleError) as error:
        Bundle.open(folder).graph("int8", "aarch64")
    assert str(error.value) == (
        f"'{folder / 'model_int8.onnx'}' reads weights from {location!r}; "
        "allowed: files that metadata.json lists"
    )


def test_external_files_by_hand(folder):
    assert external_files(folder / "model_int8.onnx") == {"model_int8.bin"}
    assert external_files(folder / "model.onnx") == set()


@pytest.mark.parametrize(
    "junk", [b"\x3alocation", b"\x3b location", b"location\xff", b"\x3a\x7flocation"]
)
def test_a_graph_that_is_no_protobuf(tmp_path, junk):
    (tmp_path / "junk.onnx").write_bytes(junk)
    with pytest.raises(BundleError) as error:
        external_files(tmp_path / "junk.onnx")
    line = f"'{tmp_path / 'junk.onnx'}' is not an ONNX graph; get a complete copy"
    assert str(error.value) == line
