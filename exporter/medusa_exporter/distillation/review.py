"""Writes the conversations of a finished data set for people to correct, and reads the corrections back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from medusa_runtime.errors import PromptError

from medusa_exporter.distillation.conversations import Conversation, conversation_rows, read_conversations
from medusa_exporter.distillation.dataset import Array, DataError, DataFacts, DataSet, Row, from_rows
from medusa_exporter.distillation.template_parts import SENTINELS, Ids, split_template
from medusa_exporter.files import atomic_write
from medusa_exporter.prompts import Message, render

REVIEWED = "reviewed"  # key of DataFacts.settings: digests of the corrections that were read


class ConversationReader:
    """Turns the tokens of a row back into messages, by the parts of the chat template.

    Raises:
        PromptError: The chat template cannot be split into parts.
    """

    def __init__(self, tokenizer: Any, eos: tuple[int, ...]) -> None:
        template = split_template(tokenizer, eos)
        self.tokenizer = tokenizer
        user_end = [] if template.ends.user is None else [template.ends.user]
        before_user, user_to_answer, answer_to_user, end = (
            re.escape(self._text(np.array(ids, np.int64)))
            for ids in (
                template.before_user,
                [*user_end, *template.user_to_answer],
                template.answer_to_user,
                [] if template.ends.answer is None else [template.ends.answer],
            )
        )
        self.later = re.compile(f"(?:{end})?{answer_to_user}(?P<user>.*){user_to_answer}", re.DOTALL)
        self.first = [re.compile(f"{before_user}(?P<user>.*){user_to_answer}", re.DOTALL)]
        system, user, _ = SENTINELS
        try:
            (text,) = render(tokenizer, [[{"role": "system", "content": system}, {"role": "user", "content": user}]])
        except PromptError:  # the template accepts no system message
            return
        parts = re.fullmatch(f"(.*){system}(.*){user}.*", text, re.DOTALL)
        if parts is not None:
            before, between = map(re.escape, parts.groups())
            self.first.append(re.compile(f"{before}(?P<system>.*?){between}(?P<user>.*){user_to_answer}", re.DOTALL))

    def messages(self, tokens: Array, marks: Array) -> tuple[Message, ...] | None:
        """Return the messages of tokens (n,) whose answers are marked (n,).

        Returns:
            The messages, `None` if the chat template did not write these tokens.
        """
        messages: list[Message] = []
        edges = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), *([len(tokens)] if len(tokens) else [])]
        for start, stop in pairwise(edges):
            if marks[start]:
                text = self._text(tokens[start:stop], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": text})
                continue
            text = self._text(tokens[start:stop])
            patterns = [self.later] if messages else self.first
            found = next((match for pattern in patterns if (match := pattern.fullmatch(text))), None)
            if found is None:
                return None
            messages += [{"role": role, "content": content} for role, content in found.groupdict().items()]
        return tuple(messages)

    def _text(self, ids: Ids, *, skip_special_tokens: bool = False) -> str:
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=skip_special_tokens)
        return text


def write_review(data: DataSet, tokenizer: Any, path: Path) -> tuple[int, int]:
    """Write one JSON line per row, with the row's number as its "id".

    Returns:
        How many rows were written, and how many could not be because the chat template did not write them.
    """
    written = 0
    with atomic_write(path) as file:
        for number, messages in _all_messages(data, tokenizer):
            if messages is not None:
                line = json.dumps({"id": number, "messages": messages}, ensure_ascii=False) + "\n"
                file.write(line.encode())
                written += 1
    return written, data.rows - written


def read_review(data: DataSet, tokenizer: Any, path: Path, context: int) -> tuple[DataSet, dict[str, int]]:
    """Read corrected lines back.

    A row whose messages are unchanged keeps its tokens, a changed one is tokenised anew, and a row without a line is
    dropped. Rows that `write_review` could not write stay.

    Args:
        data: The data set that the lines were written from.
        tokenizer: The model's tokenizer.
        path: The corrected file.
        context: Maximum number of tokens of a row.

    Returns:
        The corrected data set, and how many rows are unchanged, changed and dropped.

    Raises:
        PromptError: A line is invalid; the message names it.
        DataError: The corrections were read before, or no row is left.
    """
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    earlier = data.facts.settings.get(REVIEWED, [])
    if digest in earlier:
        raise DataError(
            f"{path}: these corrections are in the data already; write the rows again with --review-out to correct more"
        )
    lines = _by_identity(read_conversations(path), data.rows)
    counts = {"unchanged": 0, "changed": 0, "dropped": 0}
    rows: list[Row] = []
    for number, messages in _all_messages(data, tokenizer):
        line = lines.get(number)
        if messages is None or (line is not None and line.messages == messages):
            rows.append((*data.row(number), float(data.temperature[number]), int(data.groups[number])))
            counts["unchanged"] += 1
        elif line is None:
            counts["dropped"] += 1
        else:
            changed = conversation_rows(tokenizer, [line], context, data.facts.eos)
            if not changed:
                raise PromptError(f"{line.where}: no answer within {context} tokens; shorten it or delete the line")
            rows += changed
            counts["changed"] += 1
    if not rows:
        raise DataError(f"{path}: no row is left; expected the lines of some: keep the lines of rows that are to stay")
    settings = data.facts.settings | {REVIEWED: [*earlier, digest]}
    return from_rows(replace(data.facts, settings=settings), rows), counts


def without_review(facts: DataFacts) -> DataFacts:
    """Return the facts without the record of corrections."""
    return replace(facts, settings={key: value for key, value in facts.settings.items() if key != REVIEWED})


def _all_messages(data: DataSet, tokenizer: Any) -> Iterator[tuple[int, tuple[Message, ...] | None]]:
    reader = ConversationReader(tokenizer, data.facts.eos)
    for number in range(data.rows):
        yield number, reader.messages(*data.row(number))


def _by_identity(conversations: list[Conversation], rows: int) -> dict[int, Conversation]:
    lines: dict[int, Conversation] = {}
    for line in conversations:
        number = line.identity
        if type(number) is not int or not 0 <= number < rows:
            raise PromptError(f"{line.where}: 'id' is {number!r}; expected a row's number, 0 to {rows - 1}")
        if number in lines:
            raise PromptError(f"{line.where}: 'id' {number} is on {lines[number].where} too, expected each id once")
        lines[number] = line
    return lines
