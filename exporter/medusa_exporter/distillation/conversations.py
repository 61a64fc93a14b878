"""Reads ready conversations, written by people or by another model, from JSON lines, and marks their answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from medusa_runtime.errors import PromptError

from medusa_exporter.distillation.dataset import Array, Row, group_of
from medusa_exporter.distillation.template_parts import Ids
from medusa_exporter.prompts import Message, Turns, read_objects, render

NOT_GENERATED = float("nan")  # temperature of answers that the model did not generate


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer.

    Attributes:
        messages: The messages, a system message first if there is one.
        where: File and line, for error messages.
        identity: The line's "id", `None` if it has none.
    """

    messages: tuple[Message, ...]
    where: str
    identity: Any = None

    @property
    def turns(self) -> Turns:
        """Return the user's turns."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read JSON lines of the form `{"messages": [{"role": …, "content": …}, …]}`.

    A system message may come first; then user and assistant alternate, and the assistant comes last.

    Raises:
        PromptError: A line is invalid; the message names it.
    """
    conversations = []
    for where, line in read_objects(path, "messages"):
        messages = line["messages"]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise PromptError(
                f"{where}: 'messages' must be a list of objects with 'role' and 'content', the user's not empty; "
                f"got {str(messages)[:60]}"
            )
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise PromptError(
                f"{where}: the roles are {', '.join(roles)[:60] or 'none'}; expected user and assistant alternately, "
                "the assistant last, and at most one system message before them"
            )
        plain = tuple({"role": message["role"], "content": message["content"]} for message in messages)
        conversations.append(Conversation(plain, where, line.get("id")))
    return conversations


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ["system", "user", "assistant"]:
        return False
    content = message.get("content")
    return isinstance(content, str) and (message["role"] != "user" or bool(content.strip()))


def conversation_rows(
    tokenizer: Any, conversations: Iterable[Conversation], context: int, eos: tuple[int, ...]
) -> list[Row]:
    """Return the data set's rows of conversations, cut at `context` tokens; those without an answer are left out."""
    rows: list[Row] = []
    for conversation in conversations:
        tokens, marks = tokenize_conversation(tokenizer, conversation, eos)
        answered = np.flatnonzero(marks[:context])
        if len(answered):
            end = int(answered[-1]) + 1
            rows.append((tokens[:end], marks[:end], NOT_GENERATED, group_of(conversation.turns[0])))
    return rows


def tokenize_conversation(tokenizer: Any, conversation: Conversation, eos: tuple[int, ...]) -> tuple[Ids, Array]:
    """Tokenise a conversation with the chat template, and mark its answers.

    Returns:
        Token ids (n,), and marks (n,) bool of the answers' tokens and the end token after each.

    Raises:
        PromptError: The chat template changes an answer; the message names the conversation.
    """
    messages = list(conversation.messages)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        (text,) = render(tokenizer, [messages], prompt=False)
        prefixes = render(tokenizer, [messages[:place] for place in answers])
    except PromptError as error:
        raise PromptError(f"{conversation.where}: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.array(encoded["input_ids"], np.int64)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
    marks = np.zeros(len(tokens), bool)
    for place, before in zip(answers, prefixes, strict=True):
        content = messages[place]["content"]
        if not text.startswith(content, len(before)):  # templates may strip the answer, or write something before it
            content = content.strip()
        found = text.find(content, len(before)) if text.startswith(before) else -1
        if found < 0:
            raise PromptError(
                f"{conversation.where}: the chat template changes message {place + 1}; expected one that writes it "
                "unchanged: leave the conversation out"
            )
        answered = np.flatnonzero((begins >= len(before)) & (begins < found + len(content)))
        marks[answered] = True
        after = int(np.searchsorted(begins, found + len(content)))
        if after < len(tokens) and int(tokens[after]) in eos:
            marks[after] = True
    return tokens, marks
