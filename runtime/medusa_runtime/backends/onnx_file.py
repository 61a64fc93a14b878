"""A reader of ONNX files that needs no library: their weights, their operators, and every reference to another file.

An ONNX file is a protocol buffer. Its messages are walked field by field, as onnx.proto defines them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from medusa_runtime.errors import BundleError

# For each kind of message that may contain a tensor: the fields with further messages, and the kind of these.
_NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
_MODEL_DEPTH, _WEIGHT_DEPTH, _MAX_DEPTH = 0, 2, 100  # the last is the limit of protocol buffers themselves
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_VARINT_BITS = 64


class ExternalData(NamedTuple):
    """Where the bytes of a tensor are that is not stored in the ONNX file itself.

    Args:
        file: Name of a file in the folder of the ONNX file.
        offset: Position of the first byte.
        length: Number of bytes.
    """

    file: str
    offset: int
    length: int


class Weight(NamedTuple):
    """An initialiser of a graph.

    Args:
        name: Its name.
        onnx_type: Element type, as the number that ONNX's `TensorProto.DataType` gives it.
        shape: Its shape.
        external: Where its bytes are; None where they are in the ONNX file.
        inline_bytes: Bytes in the ONNX file.
    """

    name: str
    onnx_type: int
    shape: tuple[int, ...]
    external: ExternalData | None
    inline_bytes: int


class OnnxContents(NamedTuple):
    """The weights of an ONNX file in their order, and its operators as (domain, name)."""

    weights: list[Weight]
    operators: frozenset[tuple[str, str]]


def read_contents(data: bytes | memoryview, origin: str) -> OnnxContents:
    """Read the bytes of an ONNX file.

    Args:
        data: The bytes.
        origin: Name of the file, for error messages.

    Raises:
        BundleError: It is not an ONNX file; a tensor that is not an initialiser of the main graph is stored in another
            file; or the other file is not in the folder of the ONNX file.
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
                    _check_inline(weight)
        _check_names(weights)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{origin} is not a valid ONNX graph ({error!r}), expected one with readable weights; build it again"
        ) from None
    return OnnxContents(weights, frozenset(operators))


def _check_inline(tensor: Weight) -> None:
    if tensor.external:
        raise ValueError(f"{tensor.name!r:.80} is stored at {tensor.external}, expected it in the ONNX file itself")


def _check_names(weights: list[Weight]) -> None:
    names: set[str] = set()
    for weight in weights:
        if weight.name in names:
            raise ValueError(f"two weights have the name {weight.name!r:.80}")
        names.add(weight.name)


def _walk(kind: str, message: memoryview, depth: int) -> Iterator[tuple[str, memoryview, int]]:
    """Yield a message and all messages nested in it, each as its kind, its bytes and its depth."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages are nested more than {_MAX_DEPTH} deep")
    yield kind, message, depth
    nested = _NESTED.get(kind)
    if nested is None:
        return
    for field, value in _fields(message):
        if field in nested and isinstance(value, memoryview):
            yield from _walk(nested[field], value, depth + 1)


def _operator(node: memoryview) -> tuple[str, str]:
    domain = operator = ""
    for field, value in _fields(node):
        if field == _NODE_DOMAIN:
            domain = _text(value)
        elif field == _NODE_OPERATOR:
            operator = _text(value)
    return domain, operator


def _weight(tensor: memoryview) -> Weight:
    name, onnx_type, shape, inline_bytes = "", 0, [], 0
    entries: dict[str, str] = {}
    for field, value in _fields(tensor):
        if isinstance(value, int):
            if field == _TENSOR_DIMS:
                shape.append(value)
            elif field == _TENSOR_TYPE:
                onnx_type = value
        elif field == _TENSOR_DIMS:  # packed into one field, as newer writers do
            position = 0
            while position < len(value):
                size, position = _varint(value, position)
                shape.append(size)
        elif field == _TENSOR_NAME:
            name = _text(value)
        elif field == _TENSOR_RAW_DATA:
            inline_bytes += len(value)
        elif field == _TENSOR_EXTERNAL:
            entry = dict(_fields(value))
            key = _text(entry[_ENTRY_KEY])
            if key in entries:
                raise ValueError(f"{name!r:.80} has two entries {key!r:.80}")
            entries[key] = _text(entry[_ENTRY_VALUE])
    return Weight(name, onnx_type, tuple(shape), _external_data(name, entries) if entries else None, inline_bytes)


def _external_data(name: str, entries: dict[str, str]) -> ExternalData:
    external = ExternalData(
        entries["location"], _whole_number(entries.get("offset", "0")), _whole_number(entries["length"])
    )
    is_path = external.file in ("", ".", "..") or set(external.file) & set("/\\:\0")
    if is_path or min(external.offset, external.length) < 0:
        raise ValueError(f"{name!r:.80} is stored at {external}, expected a file next to the ONNX file")
    return external


def _whole_number(text: str) -> int:
    """Parse ASCII digits with an optional minus sign, as ONNX Runtime does; the caller checks the sign."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19:
        raise ValueError(f"{text!r:.40} is not a whole number")
    return int(text)


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise TypeError(f"{value} is not a text")
    return bytes(value).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield the number and the content of each field of a message: an integer for a varint, bytes otherwise."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire_type, size = tag & 7, 0
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if wire_type == _LENGTH:
            size, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("the file ends within a field")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read a varint: seven bits per byte, the lowest first. Return it and the position behind it."""
    value = shift = 0
    while shift < _VARINT_BITS:
        byte = message[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
    raise ValueError(f"a number of more than {_VARINT_BITS} bits")
