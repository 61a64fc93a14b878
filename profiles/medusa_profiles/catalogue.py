"""The catalogue: trees that are shipped with the package, by name, and trees in users' TOML files."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import resources
from pathlib import Path

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import from_toml

TREES = resources.files("medusa_profiles").joinpath("trees")


@cache
def profile_names() -> tuple[str, ...]:
    """Return the names of the shipped trees, with numbers sorted by value: tree-4 before tree-12."""
    found = [entry.name.removesuffix(".toml") for entry in TREES.iterdir() if entry.name.endswith(".toml")]
    return tuple(sorted(found, key=_natural_key))


@cache
def load_profile(name: str) -> TreeProfile:
    """Return a shipped tree.

    Example: ``load_profile("tree-8").size`` is 8.

    Args:
        name: One of `profile_names()`.

    Raises:
        ProfileError: No shipped tree has this name; the message lists the names.
    """
    if name not in profile_names():
        close = difflib.get_close_matches(name, profile_names(), n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ProfileError(f"no tree is called {name!r}{hint}; expected one of {', '.join(profile_names())}")
    return from_toml(TREES.joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml")


def load_profile_file(path: str | Path) -> TreeProfile:
    """Return the tree in a TOML file (format: `from_toml`).

    Args:
        path: Path of the file.

    Raises:
        ProfileError: The file cannot be read or does not hold a valid tree.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ProfileError(
            f"{path} cannot be read ({error.strerror or error}); expected a .toml file with a tree, or the name of a "
            "shipped one: medusa-export profiles lists them"
        ) from error
    return from_toml(text, str(path))


def profile_from_file(name: str) -> TreeProfile | None:
    """Return the tree in a file whose name ends in .toml; None for other names, which belong to trees.

    Raises:
        ProfileError: As for `load_profile_file`.
    """
    return load_profile_file(name) if name.endswith(".toml") else None


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key: the name split into text and numbers, so that numbers compare by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
