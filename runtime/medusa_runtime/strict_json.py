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
            raise ValueError("an object has the same key twice")
        return content

    def number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"{what} is not valid JSON: {error!r:.200}") from None
