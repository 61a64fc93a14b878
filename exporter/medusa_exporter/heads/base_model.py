"""Whether heads name the model that they are used with as their base."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from medusa_exporter.heads.config import config_file, read_config
from medusa_exporter.heads.files import read_json

BASE_KEY = "base_model_name_or_path"
BASE_REVISION_KEY = "base_model_revision"
# What a GGUF file's name adds to its model's: the kind of its weights, in llama.cpp's words.
_KIND = re.compile(r"[-._](?:ud-)?(?:i?q\d\w*|tq\d\w*|mxfp4\w*|bf16|f16|fp16|f32)$")
_CACHED = re.compile(r"models--(?:[^/]+?--)?(.+)")  # how the hub's cache calls a repository's folder


def base_model_mismatch(source: str | Path, names: Collection[str]) -> str | None:
    """Say so where the config.json of heads names another base than the model that they are used with; else None.

    source: folder or hub name of the heads. names: what the model may be called, such as its hub name or its folder's
    name. Of each name the last part counts, whatever the case; of a GGUF file's the kind of its weights does not.
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
        f"{path}: {BASE_KEY} is {named!r}, but the model is {called}; heads of another model guess badly. Expected "
        "heads trained for this model, unless the two are one model under two names"
    )


def model_names(folder: Path) -> list[str]:
    """What a model's folder may be called: by its path, and by the name that its config.json was saved under."""
    saved_as = read_config(folder).get("_name_or_path")
    return [str(folder.resolve()), *([saved_as] if isinstance(saved_as, str) and saved_as else [])]


def short_name(name: str) -> str:
    """The last part of a hub name or path in lower case, without a GGUF file's ending and kind of weights."""
    parts = [part for part in re.split(r"[/\\]", name.strip()) if part not in ("", ".")]
    cached = [match[1] for match in map(_CACHED.fullmatch, parts) if match]
    last = (cached or parts or [""])[-1].lower()
    stem = last.removesuffix(".gguf")
    return re.sub(r"[-._]gguf$", "", _KIND.sub("", stem))
