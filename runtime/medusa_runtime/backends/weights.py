"""The weights of an ONNX graph, read from its file without a library: how many bytes, and where those beside it lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medusa_runtime.errors import BundleError

# Field numbers of ONNX's protocol buffers (onnx.proto: ModelProto, GraphProto, TensorProto, StringStringEntryProto).
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW_DATA, TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 1, 2, 8, 9, 13, 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


class Place(NamedTuple):
    """Where a tensor's bytes lie: the file beside the graph's, and from where, and how many."""

    file: str
    offset: int
    length: int


class Weight(NamedTuple):
    """An initialiser: its ONNX type's number, its shape, and its place; None where it lies in the graph's own file."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    place: Place | None
    inside: int  # bytes in the graph's own file


def weight_bytes(graph: Path) -> int:
    """Return the bytes of all initialisers of a graph, whether they lie in its file or beside it.

    Those that share a place in the external data count once. Raises BundleError for what is no ONNX file.
    """
    weights = read_weights(graph)
    outside = {weight.place for weight in weights if weight.place}
    return sum(weight.inside for weight in weights) + sum(place.length for place in outside)


def read_weights(graph: Path) -> list[Weight]:
    """Return all initialisers of a graph; those beside it lie in its own folder. Raises BundleError."""
    try:
        return [
            _weight(tensor)
            for model_field, content in _fields(memoryview(graph.read_bytes()))
            if model_field == MODEL_GRAPH and isinstance(content, memoryview)
            for graph_field, tensor in _fields(content)
            if graph_field == GRAPH_INITIALIZER and isinstance(tensor, memoryview)
        ]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{graph} is no ONNX graph whose weights can be counted ({error!r}); build it again"
        ) from None


def _weight(tensor: memoryview) -> Weight:
    name, dtype, shape, inside = "", 0, [], 0
    entries: dict[str, str] = {}
    for field, value in _fields(tensor):
        if isinstance(value, int):
            if field == TENSOR_DIMS:
                shape.append(value)
            elif field == TENSOR_TYPE:
                dtype = value
        elif field == TENSOR_DIMS:  # all in one piece, as newer writers may put them
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                shape.append(size)
        elif field == TENSOR_NAME:
            name = bytes(value).decode()
        elif field == TENSOR_RAW_DATA:
            inside += len(value)
        elif field == TENSOR_EXTERNAL:
            entry = dict(_fields(value))
            entries[_text(entry[ENTRY_KEY])] = _text(entry[ENTRY_VALUE])
    place = None
    if entries:
        place = Place(entries["location"], int(entries.get("offset", "0")), int(entries["length"]))
        if Path(place.file).name != place.file or min(place.offset, place.length) < 0:
            raise ValueError(f"{name} lies at {place}, expected a file beside the graph's")
    return Weight(name, dtype, tuple(shape), place, inside)


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise TypeError(f"{value} is no text")
    return bytes(value).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Give the number and content of each field of a message: bytes, or a number where it is a varint."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _LENGTH:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("the file ends within a field")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first; return it and where the next thing begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
