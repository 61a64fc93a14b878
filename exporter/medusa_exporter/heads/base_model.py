"""Compares the base model that heads name with the model that they are used with."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from medusa_exporter.heads.config import config_file, read_heads_config
from medusa_exporter.heads.files import read_json

BASE_KEY = "base_model_name_or_path"
BASE_REVISION_KEY = "base_model_revision"
# The suffix of a GGUF file's name: the quantisation type, as llama.cpp names it.
_KIND = re.compile(r"[-._](?:ud-)?(?:i?q\d\w*|tq\d\w*|mxfp4\w*|bf16|f16|fp16|f32)$")
_CACHED = re.compile(r"models--(?:[^/]+?--)?(.+)")  # folder of a repository in the hub's cache


def base_model_mismatch(source: str | Path, names: Collection[str]) -> str | None:
    """Return a warning if the config.json of heads names another base model, else `None`.

    Names are compared by their last part without case: `Qwen/Qwen2.5-0.5B` and `qwen2.5-0.5b-q4_k_m.gguf` agree.

    Args:
        source: Folder or hub name of the heads.
        names: Names of the model, such as its hub name or the name of its folder.
    """
    path = config_file(source)
    named: Any = read_json(path).get(BASE_KEY) if path else None
    if not isinstance(named, str) or not named.strip():
        return None
    known = {short_name(name): name for name in reversed(list(names))}
    if short_name(named) in known:
        return None
    called = " or ".join(map(repr, reversed(known.values())))
    return (
        f"{path}: {BASE_KEY} is {named!r}, but the model is {called}; heads of another model predict badly. Expected "
        "heads trained for this model: give those, or ignore this if the two names mean one model"
    )


def model_names(folder: Path) -> list[str]:
    """Return the names of the model in a folder: its path, and the name that its config.json was saved under."""
    saved_as = read_heads_config(folder).get("_name_or_path")
    return [str(folder.resolve()), *([saved_as] if isinstance(saved_as, str) and saved_as else [])]


def short_name(name: str) -> str:
    """Return the last part of a hub name or path in lower case, without a GGUF file's suffix and quantisation type."""
    parts = [part for part in re.split(r"[/\\]", name.strip()) if part not in ("", ".")]
    cached = [match[1] for match in map(_CACHED.fullmatch, parts) if match]
    last = (cached or parts or [""])[-1].lower()
    stem = last.removesuffix(".gguf")
    return re.sub(r"[-._]gguf$", "", _KIND.sub("", stem))
