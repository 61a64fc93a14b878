"""Mutated trees in TOML: each is refused with a ProfileError, or is the tree that the TOML holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medusa_profiles import catalogue
from medusa_profiles.profile import ProfileError
from medusa_profiles.toml import from_toml, to_toml
from mutations import apply

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def prepare(_state: Path) -> dict[str, bytes]:
    """Return the shipped trees."""
    return {f"{name}.toml": to_toml(catalogue.load_profile(name)).encode() for name in catalogue.profile_names()}


def run(files: dict[str, bytes], case: dict[str, Any]) -> dict[str, Any]:
    """Read one mutated tree."""
    names = sorted(files)
    name = names[case["index"] % len(names)]
    data = files[name]
    for mutation in case["mutations"]:
        data = apply(mutation, data, name, files)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {"outcome": "refused", "layer": "text", "detail": "no UTF-8"}
    try:
        tree = from_toml(text, name)
    except ProfileError as error:
        return {"outcome": "refused", "layer": "profile", "detail": str(error)[:300]}
    said = sorted(tuple(path) for path in tomllib.loads(text)["paths"])
    if list(tree.paths) != said or tree.mask.shape != (len(said) + 1,) * 2:
        return {"outcome": "another tree", "detail": str(tree)[:300]}
    if from_toml(to_toml(tree), name) != tree:
        return {"outcome": "another tree when written", "detail": str(tree)[:300]}
    return {"outcome": "loaded", "layer": "answer", "detail": ""}
