"""Reads and writes trees as TOML: name, source, what ranks refer to, and the paths as an array of arrays.

Example::

    name = "small"
    source = "by hand"
    candidates = "heads"
    paths = [[0], [0, 0], [1]]

`candidates` is written only where it is not "heads", the default.
"""

from __future__ import annotations

import sys
from typing import Any

import tomli_w

from medusa_profiles.profile import HEADS, ProfileError, TreeProfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("name", "source", "candidates", "paths")
MAX_DOTS = 100  # in a line: Python's parser needs quadratic time for a dotted key, and trees have no dotted keys


def to_toml(profile: TreeProfile) -> str:
    """Return a tree as TOML that `from_toml` reads back: one path per line, indented by its depth."""
    more = {} if profile.candidates == HEADS else {"candidates": profile.candidates}
    head = tomli_w.dumps({"name": profile.name, "source": profile.source, **more})
    lines = [f"{'  ' * (len(path) + 1)}{list(path)},\n" for path in profile.paths]
    return f"{head}paths = [\n{''.join(lines)}]\n"


def from_toml(text: str, origin: str) -> TreeProfile:
    """Return the tree that a TOML text describes.

    Args:
        text: TOML with the keys `name`, `paths` and, optionally, `source` and `candidates`.
        origin: Where the text comes from, for example a file name; error messages start with it.

    Raises:
        ProfileError: The text is not TOML, a key is unknown or missing, a value has a wrong type, or the tree is
            malformed.
    """
    table = _parse(text, origin)
    for key in table:
        if key not in KEYS:
            raise ProfileError(f"{origin}: unknown key {key!r}; a tree has {', '.join(KEYS)}")
    for key in ("name", "paths"):
        if key not in table:
            raise ProfileError(f"{origin}: key '{key}' is missing")
    try:
        return TreeProfile(table["name"], table["paths"], table.get("source", ""), table.get("candidates", HEADS))
    except ProfileError as error:
        raise ProfileError(f"{origin}: {error}") from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    """Parse TOML, or raise ProfileError, also for nesting or numbers that are too large for the parser."""
    for number, line in enumerate(text.split("\n"), start=1):
        if (dots := line.count(".")) > MAX_DOTS:
            raise ProfileError(f"{origin}: line {number} has {dots} dots, at most {MAX_DOTS} are allowed; shorten it")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ProfileError(f"{origin}: not valid TOML: {error}") from error
