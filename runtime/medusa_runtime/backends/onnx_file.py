"""An ONNX file's messages, read without a library: its weights, its operators, and whatever points out of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from medusa_runtime.errors import BundleError

# The messages of ONNX's protocol buffers (onnx.proto) that may hold a tensor: the fields that lead to them.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
_MODEL_DEPTH, _WEIGHT_DEPTH, _DEEPEST = 0, 2, 100  # protocol buffers' own limit of nested messages
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_VARINT_BITS = 64


class ExternalData(NamedTuple):
    """Where a tensor's bytes lie: the file beside the graph's, and from where, and how many."""

    file: str
    offset: int
    length: int


class Weight(NamedTuple):
    """An initialiser: its ONNX type's number, its shape, and its place; None where it lies in the graph's own file."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    place: ExternalData | None
    inside: int  # bytes in the graph's own file


class OnnxContents(NamedTuple):
    """The weights of an ONNX file in their order, and its operators: (domain, name)."""

    weights: list[Weight]
    operators: frozenset[tuple[str, str]]


def read_contents(data: bytes | memoryview, origin: str) -> OnnxContents:
    """Read an ONNX file's bytes; `origin` names it in errors.

    Raises BundleError for what is no ONNX file, and for a tensor that lies in another file without being a weight of
    the graph itself, or lies anywhere but in a file of the graph's own folder.
    """
    weights: list[Weight] = []
    operators: set[tuple[str, str]] = set()
    try:
        for kind, message, depth in _walk("model", memoryview(data), _MODEL_DEPTH):
            if kind == "node":
                operators.add(_operator(message))
            if kind == "tensor":
                weight = _weight(message)
                if depth == _WEIGHT_DEPTH:
                    weights.append(weight)
                else:
                    _check_inside(weight)
        _check_names(weights)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{origin} is no ONNX graph whose weights can be counted ({error!r}); build it again"
        ) from None
    return OnnxContents(weights, frozenset(operators))


def _check_inside(tensor: Weight) -> None:
    if tensor.place:
        raise ValueError(f"{tensor.name!r:.80} lies at {tensor.place}, expected it in the graph's own file")


def _check_names(weights: list[Weight]) -> None:
    names: set[str] = set()
    for weight in weights:
        if weight.name in names:
            raise ValueError(f"two weights are called {weight.name!r:.80}")
        names.add(weight.name)


def _walk(kind: str, message: memoryview, depth: int) -> Iterator[tuple[str, memoryview, int]]:
    """Give every message of the kinds above, with its kind and how deep it lies."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested more than {_DEEPEST} deep")
    yield kind, message, depth
    inside = _INSIDE.get(kind)
    if inside is None:
        return
    for field, value in _fields(message):
        if field in inside and isinstance(value, memoryview):
            yield from _walk(inside[field], value, depth + 1)


def _operator(node: memoryview) -> tuple[str, str]:
    domain = operator = ""
    for field, value in _fields(node):
        if field == _NODE_DOMAIN:
            domain = _text(value)
        elif field == _NODE_OPERATOR:
            operator = _text(value)
    return domain, operator


def _weight(tensor: memoryview) -> Weight:
    name, dtype, shape, inside = "", 0, [], 0
    entries: dict[str, str] = {}
    for field, value in _fields(tensor):
        if isinstance(value, int):
            if field == _TENSOR_DIMS:
                shape.append(value)
            elif field == _TENSOR_TYPE:
                dtype = value
        elif field == _TENSOR_DIMS:  # all in one piece, as newer writers may put them
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                shape.append(size)
        elif field == _TENSOR_NAME:
            name = _text(value)
        elif field == _TENSOR_RAW_DATA:
            inside += len(value)
        elif field == _TENSOR_EXTERNAL:
            entry = dict(_fields(value))
            key = _text(entry[_ENTRY_KEY])
            if key in entries:
                raise ValueError(f"{name!r:.80} has two entries {key!r:.80}")
            entries[key] = _text(entry[_ENTRY_VALUE])
    return Weight(name, dtype, tuple(shape), _place(name, entries) if entries else None, inside)


def _place(name: str, entries: dict[str, str]) -> ExternalData:
    place = ExternalData(entries["location"], _number(entries.get("offset", "0")), _number(entries["length"]))
    if place.file in ("", ".", "..") or set(place.file) & set("/\\:\0") or min(place.offset, place.length) < 0:
        raise ValueError(f"{name!r:.80} lies at {place}, expected a file beside the graph's")
    return place


def _number(text: str) -> int:
    """Return a number of ASCII digits, as ONNX Runtime reads it too; its sign is for the caller to judge."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19:
        raise ValueError(f"{text!r:.40} is no whole number")
    return int(text)


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
    while shift < _VARINT_BITS:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than {_VARINT_BITS} bits")
