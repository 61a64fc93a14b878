"""Conversations of a finished data set, written out for people to correct and taken back."""

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

REVIEWED = "reviewed"  # the key of DataFacts.settings that names the corrections taken in


class ConversationReader:
    """Reads a row's tokens back as messages, by the template's frame. Raises PromptError where there is none."""

    def __init__(self, tokenizer: Any, eos: tuple[int, ...]) -> None:
        frame = split_template(tokenizer, eos)
        self.tokenizer = tokenizer
        user_end = [] if frame.ends.user is None else [frame.ends.user]
        opening, middle, following, end = (
            re.escape(self._text(np.array(ids, np.int64)))
            for ids in (
                frame.opening,
                [*user_end, *frame.middle],
                frame.following,
                [] if frame.ends.answer is None else [frame.ends.answer],
            )
        )
        self.later = re.compile(f"(?:{end})?{following}(?P<user>.*){middle}", re.DOTALL)
        self.first = [re.compile(f"{opening}(?P<user>.*){middle}", re.DOTALL)]
        system, user, _ = SENTINELS
        try:
            (text,) = render(tokenizer, [[{"role": "system", "content": system}, {"role": "user", "content": user}]])
        except PromptError:  # the template takes no system message
            return
        parts = re.fullmatch(f"(.*){system}(.*){user}.*", text, re.DOTALL)
        if parts is not None:
            before, between = map(re.escape, parts.groups())
            self.first.append(re.compile(f"{before}(?P<system>.*?){between}(?P<user>.*){middle}", re.DOTALL))

    def messages(self, tokens: Array, marks: Array) -> tuple[Message, ...] | None:
        """Return the messages of tokens (n,) whose answers are marked (n,), None where they do not fit the frame."""
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
    """Write one JSON line a row, with the row's number as its "id"; return how many rows could and could not be."""
    written = 0
    with atomic_write(path) as file:
        for number, messages in _all_messages(data, tokenizer):
            if messages is not None:
                line = json.dumps({"id": number, "messages": messages}, ensure_ascii=False) + "\n"
                file.write(line.encode())
                written += 1
    return written, data.rows - written


def read_review(data: DataSet, tokenizer: Any, path: Path, context: int) -> tuple[DataSet, dict[str, int]]:
    """Take corrected lines back; return the data set and how many rows are unchanged, changed, dropped.

    A line whose messages are the row's own keeps its tokens; any other is laid out anew; a row whose line is missing is
    dropped, but for rows that `write_review` could not write, which stay. Raises PromptError naming the line at fault
    and DataError when the file was taken in before other corrections or leaves nothing.
    """
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    taken = data.facts.settings.get(REVIEWED, [])
    if digest in taken:
        raise DataError(f"{path}: these corrections are in the data already; write the rows out again to correct more")
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
        raise DataError(f"{path}: no row is left; expected the lines of some")
    settings = data.facts.settings | {REVIEWED: [*taken, digest]}
    return from_rows(replace(data.facts, settings=settings), rows), counts


def without_review(facts: DataFacts) -> DataFacts:
    """The facts as they were before corrections."""
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
            raise PromptError(f"{line.where}: 'id' {number} stands on {lines[number].where} too; expected it once")
        lines[number] = line
    return lines
