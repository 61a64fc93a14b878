"""Chooses the chat template of a model, and collects its other ones."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError

DEFAULT = "default"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
MAX_TEMPLATE_BYTES = 1 << 20  # bytes of a template


@dataclass(frozen=True)
class ChatTemplates:
    """A model's chat templates as Jinja sources.

    Attributes:
        chosen: The template to use; None if the model has none.
        named: All named templates of the model, including `default`; empty if there is only the chosen one.
    """

    chosen: str | None
    named: dict[str, str] = field(default_factory=dict)


def choose_template(tokenizer: Any, wanted: str | None = None) -> ChatTemplates:
    """Choose a chat template and set it as the tokenizer's only one, so that every later step uses the same.

    Args:
        tokenizer: Its `chat_template` is a text, or a mapping from names to texts if the model has several.
        wanted: Name of one of these, or a Jinja file; None is `default`, or the only one.

    Raises:
        PromptError: `wanted` is neither a name nor a file, or there are several templates without a default.
    """
    own = _own(getattr(tokenizer, "chat_template", None))
    chosen = _default(own) if wanted is None else own[wanted] if wanted in own else _read(wanted, own)
    tokenizer.chat_template = chosen
    return ChatTemplates(chosen, {} if set(own.values()) <= {chosen} else own)


def try_template(template: str, special_tokens: dict[str, str]) -> str | None:
    """Render one short question; return the template's error, or None if it succeeds.

    Raises:
        PromptError: The template is not valid Jinja, so no bundle could use it.
    """
    compiled = ChatTemplate(template, special_tokens)
    try:
        compiled.render([{"role": "user", "content": "Hello"}])
    except PromptError as error:
        return str(error)
    return None


def describe_wanted(wanted: str | None) -> str | None:
    """Return a value that identifies the wanted template in comparisons: its name, or the digest of its file."""
    if wanted is None or not (path := Path(wanted).expanduser()).is_file():
        return wanted
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _own(found: Any) -> dict[str, str]:
    if not found:
        return {}
    named = found if isinstance(found, dict) else {DEFAULT: found}
    for name, text in named.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(text, str):
            raise PromptError(
                f"the model has a chat template named {str(name)[:60]!r} that is a {type(text).__name__}; expected "
                "texts under names of letters, digits, '_', '.' and '-': correct tokenizer_config.json"
            )
    return {name: text for name, text in named.items() if text}


def _default(own: dict[str, str]) -> str | None:
    if DEFAULT in own or len(own) < 2:
        return own.get(DEFAULT) or next(iter(own.values()), None)
    raise PromptError(
        f"the model has the chat templates {', '.join(sorted(own))} and no default; expected one to be chosen: name it "
        "with --chat-template"
    )


def _read(wanted: str, own: dict[str, str]) -> str:
    path = Path(wanted).expanduser()
    if not path.is_file():
        has = f"the model has {', '.join(sorted(own))}" if own else "the model has none"
        raise PromptError(
            f"chat template {wanted!r} is neither a file nor one of the model's; {has}: expected the name of one of "
            "these, or a Jinja file; give one of the two"
        )
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise PromptError(
                f"{path}: more than {MAX_TEMPLATE_BYTES} bytes, expected a chat template; give its Jinja file"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error}), expected a chat template; give its Jinja file") from error
    if not text.strip():
        raise PromptError(f"{path}: empty, expected a chat template; give its Jinja file")
    return text
