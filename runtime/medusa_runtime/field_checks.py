"""Checks of what a manifest says: each refuses a value with BundleError, naming what was got and what was expected."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from medusa_runtime.errors import BundleError


def refuse(what: str, got: object, expected: str) -> NoReturn:
    """Raise BundleError: `what` is not what was expected."""
    raise BundleError(f"{what} is {got!r:.80}, expected {expected}")


def check_int(what: str, value: object, least: int, most: int) -> None:
    """Refuse all but a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:  # bool is refused too
        refuse(what, value, f"a whole number from {least} to {most}")


def check_text(what: str, value: object, pattern: re.Pattern[str] | None = None) -> str:
    """Return a text of printable characters, of the whole `pattern` if there is one; refuse all else."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        refuse(what, value, "a text of 1 to 1000 printable characters")
    if pattern is not None and not pattern.fullmatch(value):
        refuse(what, value, f"a text of the form {pattern.pattern}")
    return value


def check_object(what: str, value: object) -> dict[str, Any]:
    """Return a JSON object; refuse all else."""
    return value if isinstance(value, dict) else refuse(what, value, "an object")


def check_path(what: str, value: object) -> None:
    """Refuse every path but a relative POSIX one that stays below the folder it starts from (BundleError)."""
    path = check_text(what, value)
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in path.split("/")):
        refuse(what, path, "a relative path with '/' between its parts that stays inside the bundle")


def check_unique(what: str, values: object) -> tuple[Any, ...]:
    """Return a tuple that holds nothing twice; refuse all else."""
    if not isinstance(values, tuple) or len(set(values)) != len(values):
        refuse(what, values, "a tuple without repetitions")
    return values
