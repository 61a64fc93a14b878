"""Reads all chat templates of a GGUF file; transformers reads only the default one."""

from __future__ import annotations

from pathlib import Path

from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.loading.gguf_metadata import open_gguf
from medusa_exporter.loading.templates import DEFAULT

KEY = "tokenizer.chat_template"  # key of the default template; named ones have the key KEY.NAME


def gguf_templates(path: Path) -> dict[str, str] | None:
    """Return a file's chat templates by name, for `choose_template`; None if it has none."""
    found = {}
    for key, field in open_gguf(path).fields.items():
        if key == KEY or key.startswith(f"{KEY}."):
            text = field.contents()
            if not isinstance(text, str):
                raise UnsupportedModelError(
                    f"{path.name}: {key} is a {type(text).__name__}, expected the text of a chat template; download or "
                    "convert the file again"
                )
            found[DEFAULT if key == KEY else key.removeprefix(f"{KEY}.")] = text
    return found or None
