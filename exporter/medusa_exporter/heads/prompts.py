"""Prompts: read from JSON lines, laid out by the model's chat template, compared with those to leave out."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_runtime.errors import PromptError

SENTINEL = "medusa7sentinel3turn"
Turns = tuple[str, ...]


def read_prompts(path: str | Path) -> list[Turns]:
    """Read one conversation's user turns a line, `{"turns": ["…", …]}`; raise PromptError naming the line at fault."""
    prompts: list[Turns] = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # JSON texts may hold other line breaks
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error}); expected JSON lines with 'turns'") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            turns = json.loads(line)["turns"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: expected a JSON object with 'turns', got {line[:60]!r}") from error
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise PromptError(f"{path}:{number}: 'turns' must be a list of texts, none empty; got {str(turns)[:60]}")
        prompts.append(tuple(turns))
    return prompts


def normalise(text: str) -> str:
    """Return the text's words alone, NFKC-normalised and case-folded, so that trifles make no difference."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def without(prompts: Iterable[Turns], excluded: Iterable[Turns]) -> list[Turns]:
    """Leave out each conversation that shares a turn, normalised, with `excluded`."""
    refused = {normalise(turn) for turns in excluded for turn in turns}
    return [turns for turns in prompts if not any(normalise(turn) in refused for turn in turns)]


def distinct(texts: Iterable[str]) -> list[str]:
    """Leave out texts without a word and those that equal an earlier one, normalised."""
    seen = {""}
    kept = []
    for text in texts:
        key = normalise(text)
        if key not in seen:
            seen.add(key)
            kept.append(text)
    return kept


def lay_out(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation as the model's chat template writes it, up to where the answer begins."""
    if not conversations:
        return []
    _check_template(tokenizer)
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def user_frame(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template writes before a first user turn and what ends it.

    Raises PromptError when the template does not write the turn as it stands.
    """
    _check_template(tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": SENTINEL}], tokenize=False)
    before, found, after = text.partition(SENTINEL)
    if not found or not after.strip():
        raise PromptError("the chat template does not show where a user turn begins and ends; use no --synthesize")
    return before, after.strip()


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the model has no chat template; expected an instruction-tuned model with one")
