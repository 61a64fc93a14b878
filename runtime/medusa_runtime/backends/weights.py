"""How many bytes of weights an ONNX graph has, read from its file without a library and without the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medusa_runtime.errors import BundleError

# Field numbers of ONNX's protocol buffers.
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
TENSOR_RAW_DATA, TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 9, 13, 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


def weight_bytes(graph: Path) -> int:
    """Return the bytes of all initialisers of a graph, whether they lie in its file or beside it.

    Those that share a place in the external data count once. Raises BundleError for what is no ONNX file.
    """
    inside, outside = 0, {}
    try:
        for model_field, content in _fields(memoryview(graph.read_bytes())):
            if model_field != MODEL_GRAPH:
                continue
            for graph_field, tensor in _fields(content):
                if graph_field != GRAPH_INITIALIZER:
                    continue
                place: dict[str, str] = {}
                for tensor_field, value in _fields(tensor):
                    if tensor_field == TENSOR_RAW_DATA:
                        inside += len(value)
                    elif tensor_field == TENSOR_EXTERNAL:
                        entry = dict(_fields(value))
                        place[bytes(entry[ENTRY_KEY]).decode()] = bytes(entry[ENTRY_VALUE]).decode()
                if place:
                    outside[place["location"], place.get("offset", "0")] = int(place["length"])
    except (IndexError, KeyError, ValueError) as error:
        raise BundleError(
            f"{graph} is no ONNX graph whose weights can be counted ({error!r}); build it again"
        ) from None
    return inside + sum(outside.values())


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give the number and content of each field of a message; of numbers the content is empty."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _LENGTH:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
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
