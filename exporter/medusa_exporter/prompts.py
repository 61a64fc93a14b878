"""Prompts: reads them from JSON lines, renders them by a chat template, leaves out excluded ones."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medusa_runtime.errors import PromptError

Turns = tuple[str, ...]
Message = dict[str, str]


def read_objects(path: str | Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (`path:line`) and the content of each JSON line that is not blank.

    Raises PromptError for a line that is not an object with `key`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # JSON texts may hold other line breaks
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error}); expected JSON lines with {key!r}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            found[key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: expected a JSON object with {key!r}, got {line[:60]!r}") from error
        yield f"{path}:{number}", found


def read_prompts(path: str | Path) -> list[Turns]:
    """Read one conversation per line, `{"turns": ["…", …]}`; raise PromptError for an invalid line."""
    prompts: list[Turns] = []
    for where, line in read_objects(path, "turns"):
        turns = line["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise PromptError(f"{where}: 'turns' must be a list of texts, none empty; got {str(turns)[:60]}")
        prompts.append(tuple(turns))
    return prompts


def load_prompts(file: Path, limit: int | None) -> list[Turns]:
    """Read the first `limit` conversations of a file, None for all. Raises PromptError if there are none."""
    prompts = read_prompts(file)
    if not prompts:
        raise PromptError(f"{file} holds no prompts; expected JSON lines with 'turns', a list of user messages")
    return prompts[:limit]


def read_categories(path: str | Path) -> list[str | None]:
    """Return the "category" of each line, None if it has none, in the order of `read_prompts`."""
    found = (line.get("category") for _, line in read_objects(path, "turns"))
    return [category if isinstance(category, str) else None for category in found]


def normalise(text: str) -> str:
    """Return the words of a text, NFKC-normalised and case-folded, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def turn_keys(conversations: Iterable[Turns]) -> set[str]:
    """Return all turns of the conversations, normalised."""
    return {normalise(turn) for turns in conversations for turn in turns}


def without(prompts: Iterable[Turns], excluded: Iterable[Turns]) -> list[Turns]:
    """Return the conversations that share no turn with `excluded`; turns are normalised before they are compared."""
    refused = turn_keys(excluded)
    return [turns for turns in prompts if not shares_turn(turns, refused)]


def shares_turn(turns: Turns, keys: set[str]) -> bool:
    """Return whether one of the turns, normalised, is among `keys`, see `turn_keys`."""
    return any(normalise(turn) in keys for turn in turns)


def prompt_ids(tokenizer: Any, conversations: list[list[Message]]) -> list[list[int]]:
    """Return the token ids of each conversation, as the chat template renders it, up to the start of the answer."""
    if not conversations:
        return []
    ids: list[list[int]] = tokenizer(render(tokenizer, conversations), add_special_tokens=False)["input_ids"]
    return ids


def render(tokenizer: Any, conversations: list[list[Message]], *, prompt: bool = True) -> list[str]:
    """Return the text of each conversation, as the chat template renders it.

    Args:
        tokenizer: The model's tokenizer.
        conversations: Messages with "role" and "content".
        prompt: Whether the text ends with the start of the next answer.

    Raises:
        PromptError: If there is no template, or it refuses a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the model has no chat template; expected an instruction-tuned model with one")
    if not conversations:
        return []
    try:
        texts: list[str] = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template raises what it likes
        raise PromptError(
            f"the chat template refuses a conversation ({error}); expected one that it accepts"
        ) from error
    return texts
