"""Checks of fields in JSON files; each raises BundleError that names the value found and the value expected."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, NoReturn

from medusa_profiles.profile import shown

from medusa_runtime.errors import BundleError


def refuse(what: str, got: object, expected: str) -> NoReturn:
    """Raise BundleError for the field `what`, with the value found and a description of the expected one."""
    raise BundleError(f"{what} is {shown(got)}, expected {expected}")


def check_int(what: str, value: object, least: int, most: int) -> None:
    """Raise BundleError unless the value is an int from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:  # excludes bool
        refuse(what, value, f"a whole number from {least} to {most}")


def check_number(what: str, value: object, least: float, most: float) -> float:
    """Return an int or float from `least` to `most`; raise BundleError for anything else, NaN included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        refuse(what, value, f"a number from {least:g} to {most:g}")
    return float(value)


def check_keys(what: str, content: dict[str, Any], expected: set[str]) -> None:
    """Raise BundleError unless a JSON object has exactly the expected keys."""
    if missing := sorted(expected - content.keys()):
        raise BundleError(f"{what} lacks the key {missing[0]!r}")
    if unknown := sorted(content.keys() - expected):
        refuse(f"a key of {what}", unknown[0], f"one of {', '.join(sorted(expected))}")


def check_text(what: str, value: object, pattern: re.Pattern[str] | None = None) -> str:
    """Return a str of printable characters that matches the whole `pattern`; raise BundleError otherwise."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        refuse(what, value, "a text of 1 to 1000 printable characters")
    if pattern is not None and not pattern.fullmatch(value):
        refuse(what, value, f"a text of the form {pattern.pattern}")
    return value


def check_object(what: str, value: object) -> dict[str, Any]:
    """Return a JSON object; raise BundleError otherwise."""
    return value if isinstance(value, dict) else refuse(what, value, "an object")


def check_fields(what: str, value: object, kind: type) -> dict[str, Any]:
    """Return a copy of a JSON object whose keys are the fields of a dataclass; raise BundleError otherwise."""
    content = dict(check_object(what, value))
    check_keys(what, content, {one.name for one in fields(kind)})
    return content


def check_list(what: str, value: object, most: int) -> list[Any]:
    """Return a JSON list of 1 to `most` items; raise BundleError otherwise."""
    if not isinstance(value, list) or not 0 < len(value) <= most:
        refuse(what, value, f"a list of 1 to {most} items")
    return value


def check_path(what: str, value: object) -> None:
    """Raise BundleError unless the value is a relative POSIX path without `.`, `..` and empty parts."""
    path = check_text(what, value)
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in path.split("/")):
        refuse(what, path, "a relative path with '/' between its parts that stays inside the bundle")


def check_unique(what: str, values: object) -> tuple[Any, ...]:
    """Return a tuple without duplicates; raise BundleError otherwise."""
    if not isinstance(values, tuple) or len(set(values)) != len(values):
        refuse(what, values, "a tuple without repetitions")
    return values
