"""``metadata.json``: what a bundle says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import PureWindowsPath
from typing import Any

from edge_ser.audio import MAX_RATE_HZ, MIN_RATE_HZ, is_too_short
from edge_ser.errors import BundleError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BundleFile:
    """One entry of ``files``: the file's SHA-256 in hex, and whether the bundle needs it."""

    sha256: str
    required: bool


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The contents of ``metadata.json``. Creating one checks every value.

    Attributes:
        schema_version: The version of this layout.
        name: The name of the model.
        labels: What the logits stand for, in their order; two or more, all different.
        sample_rate_hz: The rate of the samples that the graph takes.
        window_s: Length of a window in seconds, 0.4 to 60.
        hop_s: Distance between the starts of two windows in seconds, 0.01 or more. At least 0.4 s
            less than the window, so that no last window is shorter than 0.4 s.
        temperature: The logits are divided by it before the softmax; 0.01 to 100.
        abstain_below: A confidence below it is called uncertain; 0 to 1.
        certified: Whether the INT8 graphs answer as full precision does, by the gate of
            ``certificate.json``.
        encoder: What the model was made of, free-form; so are ``head`` and ``teacher``.
        head: See ``encoder``.
        teacher: What it was distilled from, or None.
        corpora: What it was trained on: name, language, licence and source of each.
        tools: The versions of the packages that made it.
        files: The files by name; names are plain, without folders.

    Raises:
        BundleError: A value has a wrong type or lies outside its range.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    labels: tuple[str, ...]
    sample_rate_hz: int
    window_s: float
    hop_s: float
    temperature: float
    abstain_below: float
    certified: bool
    encoder: dict[str, Any]
    head: dict[str, Any]
    teacher: dict[str, Any] | None
    corpora: tuple[dict[str, str], ...]
    tools: dict[str, str]
    files: dict[str, BundleFile]

    def __post_init__(self) -> None:
        for field, allowed, is_valid in _RULES:
            if not is_valid(self):
                raise BundleError(f"{field} is {getattr(self, field)!r}; allowed: {allowed}")

    @classmethod
    def from_json(cls, document: object) -> Metadata:
        """Read what `to_json` wrote.

        Raises:
            BundleError: A key is missing or unknown, or a value is not allowed.
        """
        if not isinstance(document, dict):
            raise BundleError(f"it holds a {type(document).__name__}; allowed: an object")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:  # first of all: it decides which keys there are
            raise BundleError(f"schema_version is {version!r}; allowed: {SCHEMA_VERSION}")
        keys = {field.name for field in fields(cls)}
        if missing := sorted(keys - document.keys()):
            raise BundleError(f"missing: {', '.join(missing)}")
        if unknown := sorted(document.keys() - keys):
            raise BundleError(
                f"unknown: {', '.join(map(repr, unknown))}; allowed: {', '.join(sorted(keys))}"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in document.items()
        }
        values["files"] = _read_files(document["files"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def graph_properties(self) -> dict[str, Any]:
        """Return what every graph repeats in its ``metadata_props``, each value as JSON there."""
        document = self.to_json()
        return {key: document[key] for key in ("labels", "sample_rate_hz", "schema_version")}


def _is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_labels(value: object) -> bool:
    if not isinstance(value, tuple) or not all(map(_is_text, value)):
        return False
    return len(set(value)) == len(value) >= 2


def _overlap(metadata: Metadata) -> bool:
    rate = metadata.sample_rate_hz
    overlap = round(metadata.window_s * rate) - round(metadata.hop_s * rate)
    return not is_too_short(overlap, rate)


# Field, what is allowed, the check; in this order, for a later check relies on the earlier ones.
_RULES: tuple[tuple[str, str, Callable[[Metadata], bool]], ...] = (
    ("schema_version", f"{SCHEMA_VERSION}", lambda m: m.schema_version == SCHEMA_VERSION),
    ("name", "a text", lambda m: _is_text(m.name)),
    ("labels", "two or more different texts", lambda m: _are_labels(m.labels)),
    (
        "sample_rate_hz",
        f"a whole number, {MIN_RATE_HZ} to {MAX_RATE_HZ}",
        lambda m: type(m.sample_rate_hz) is int and MIN_RATE_HZ <= m.sample_rate_hz <= MAX_RATE_HZ,
    ),
    ("window_s", "a number, 0.4 to 60", lambda m: _is_number(m.window_s, 0.4, 60)),
    ("hop_s", "a number, 0.01 to 60", lambda m: _is_number(m.hop_s, 0.01, 60)),
    ("hop_s", "window_s - 0.4 or less", _overlap),
    ("temperature", "a number, 0.01 to 100", lambda m: _is_number(m.temperature, 0.01, 100)),
    ("abstain_below", "a number, 0 to 1", lambda m: _is_number(m.abstain_below, 0, 1)),
    ("certified", "true or false", lambda m: type(m.certified) is bool),
    ("encoder", "an object", lambda m: isinstance(m.encoder, dict)),
    ("head", "an object", lambda m: isinstance(m.head, dict)),
    ("teacher", "an object or null", lambda m: isinstance(m.teacher, dict | None)),
    (
        "corpora",
        "a list of objects of texts",
        lambda m: isinstance(m.corpora, tuple) and all(map(_are_texts, m.corpora)),
    ),
    ("tools", "an object of texts", lambda m: _are_texts(m.tools)),
)


def _read_files(files: object) -> dict[str, BundleFile]:
    """Return the entries of ``files``, each checked."""
    if not isinstance(files, dict) or not files:
        raise BundleError(f"files is {files!r}; allowed: an object with an entry for each file")
    for name, entry in files.items():
        if PureWindowsPath(name).name != name or name in {"", ".", ".."}:
            raise BundleError(f"files has {name!r}; allowed: plain names inside the bundle")
        valid = isinstance(entry, dict) and entry.keys() == {"sha256", "required"}
        valid = valid and type(entry["required"]) is bool and isinstance(entry["sha256"], str)
        if not valid or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            allowed = '{"sha256": 64 hex digits, "required": true or false}'
            raise BundleError(f"files has {name!r}: {entry!r}; allowed: {allowed}")
    return {name: BundleFile(**entry) for name, entry in files.items()}
