"""Compares the config.json of heads with their weights; if the two differ, the weights count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa_exporter.heads.architecture import HeadArchitecture
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import CONFIG_NAME, hub_file, read_json
from medusa_exporter.heads.layouts import Layout


def config_file(source: str | Path) -> Path | None:
    """Return the config.json of a folder, of the folder of a file, or of a hub name; `None` if there is none."""
    place = Path(source).expanduser()
    if place.exists():
        path = (place if place.is_dir() else place.parent) / CONFIG_NAME
        return path if path.is_file() else None
    try:
        return hub_file(str(source), CONFIG_NAME)
    except HeadsError:
        return None


def read_heads_config(source: str | Path) -> dict[str, Any]:
    """Read the config.json of `source`, empty if there is none; raise HeadsError if it is no JSON object."""
    path = config_file(source)
    return read_json(path) if path else {}


def warn_of_mismatches(
    source: str | Path, layout: Layout, facts: HeadArchitecture, vocab_size: int | None, taps: Sequence[int] = ()
) -> None:
    """Issue a UserWarning for every value in config.json that differs from the weights or the model.

    Args:
        source: Folder, file or hub name of the heads.
        layout: Their layout, which says what the keys of config.json mean.
        facts: Their architecture.
        vocab_size: Vocabulary size of the model, `None` if it is not known.
        taps: The decoder layers that the heads tap.
    """
    path = config_file(source)
    if path is None:
        return
    config = read_json(path)
    actual = {
        "heads": facts.heads,
        "layers": facts.layers,
        "conditioning": facts.conditioning,
        "hidden_size": facts.hidden_size,
        "vocabulary": vocab_size,
        "draft_vocabulary": facts.draft_vocabulary or vocab_size,
        "taps": list(taps),
        "trunk": facts.trunk,
    }
    for key, fact in layout.config_keys.items():
        stated, value = _lookup(config, key), actual[fact]
        if stated is not None and value is not None and stated != value:
            warnings.warn(
                f"{path}: {key} is {stated!r}, but by weights and model it is {value!r}, which is used",
                stacklevel=3,
            )


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
