"""Which other files an ONNX graph reads its weights from.

ONNX Runtime up to 1.23 follows such a location anywhere on the disk, and crashes on its own marker
for weights in memory. So the locations are read here, from the protobuf itself (the runtime does
not need the ``onnx`` package), and `Bundle.graph` allows only files that the bundle lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_ser.errors import BundleError

# Where external data can hide: message -> field number -> message, by the numbers in onnx.proto.
_CHILDREN = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_files(graph: Path) -> set[str]:
    """Return every external location that an ONNX file names.

    Raises:
        BundleError: The file is not a protobuf.
    """
    try:
        return set(_locations("Model", graph.read_bytes()))
    except (IndexError, ValueError) as exc:
        raise BundleError(f"{str(graph)!r} is not an ONNX graph; get a complete copy") from exc


def _locations(message: str, data: bytes) -> Iterator[str]:
    if b"location" not in data:  # the key of every location: most messages need no look inside
        return
    if message == "Entry":
        entry = dict(_fields(data))
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8", "backslashreplace")
        return
    children = _CHILDREN[message]
    for number, value in _fields(data):
        if number in children:
            yield from _locations(children[number], value)


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and payload of every length-delimited field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        key &= 0xFFFFFFFF  # as protobuf's own parser does
        wire = key & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field is longer than its message")
            yield key >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset, seven bits a byte, and the offset behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at
