"""Writes a bundle's tokenizer, chat templates and special tokens in the files that the runtime reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_runtime.bundle import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, named_template_path

from medusa_exporter.loading.templates import ChatTemplates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, templates: ChatTemplates) -> None:
    """Write the tokenizer, the chosen chat template and the model's named ones into the folder of a bundle."""
    (folder / "tokenizer").mkdir()
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    found = {named_template_path(name): text for name, text in templates.named.items()}
    for file, text in (found | ({CHAT_TEMPLATE: templates.chosen} if templates.chosen else {})).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8", newline="")
    special = json.dumps(special_tokens(tokenizer), indent=2, sort_keys=True)
    (folder / SPECIAL_TOKENS).write_text(special, encoding="utf-8")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the special tokens that a chat template may use, by name, such as `bos_token`."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
