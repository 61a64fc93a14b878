"""Parses JSON that must not surprise its reader: limited size, UTF-8, unique keys, no NaN and no infinity."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from medusa_runtime.errors import BundleError


def parse_json(what: str, data: bytes, most: int) -> Any:
    """Return the value of strict JSON; raise BundleError, which begins with `what`, for anything else.

    Args:
        what: What the JSON is, for example "the manifest".
        data: The JSON.
        most: Maximum number of bytes. Objects and lists may be nested as deeply as Python's parser allows.
    """
    if len(data) > most:
        raise BundleError(f"{what} has more than {most} bytes")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) != len(pairs):
            raise _RefusedError("an object has the same key twice")
        return content

    def number(name: str) -> NoReturn:
        raise _RefusedError(f"{name} is not a number")

    try:
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"{what} is not valid JSON: {describe_json_error(error)}") from None


def describe_json_error(error: Exception) -> str:
    """Return in words what is wrong with text that `json.loads` does not read; nothing of the text is repeated.

    Args:
        error: ValueError (also of the decoding of the text's bytes), RecursionError or MemoryError.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        fault = error.msg.partition(" (")[0].removesuffix(" at").removesuffix(" starting")
        fault = fault.replace("Expecting", "expected")
        line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
        return f"{fault[0].lower()}{fault[1:]} at {line}column {error.colno}"
    if isinstance(error, RecursionError):
        return "too many lists and objects are inside one another"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return str(error) if isinstance(error, _RefusedError) else "a number has too many digits"


class _RefusedError(ValueError):
    """JSON as Python reads it, but not as it should be."""
