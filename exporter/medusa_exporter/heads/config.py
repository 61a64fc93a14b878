"""The config.json beside heads: what it states is compared with what the weights say, and the weights win."""

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
    """The config.json of a folder, of a file's folder or of a hub name; None where there is none."""
    place = Path(source).expanduser()
    if place.exists():
        path = (place if place.is_dir() else place.parent) / CONFIG_NAME
        return path if path.is_file() else None
    try:
        return hub_file(str(source), CONFIG_NAME)
    except HeadsError:
        return None


def read_config(source: str | Path) -> dict[str, Any]:
    """Read the config.json of `source`, empty where there is none; raise HeadsError when it is no JSON object."""
    path = config_file(source)
    return read_json(path) if path else {}


def warn_of_mismatches(
    source: str | Path, layout: Layout, facts: HeadArchitecture, vocab_size: int | None, taps: Sequence[int] = ()
) -> None:
    """Warn (UserWarning) of every value in config.json that the weights contradict.

    vocab_size: V of the model, or None where it is not known. taps: the decoder layers that the heads tap.
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
                f"{path}: {key} is {stated!r}, but weights and model say {value!r}; the weights win",
                stacklevel=3,
            )


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
