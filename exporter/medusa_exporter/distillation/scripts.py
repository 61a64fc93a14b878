"""What the rows are to hold: scripts of given tokens and of parts that the model writes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_exporter.distillation.template_parts import EndTokens, Ids, TemplateParts, later_turns
from medusa_exporter.prompts import Turns, prompt_ids

GIVEN, USER, ANSWER = 0, 1, 2  # the role of a token: forced, or written by the model as the user's turn or an answer
USER_TEMPERATURE = 0.9
USER_TOKENS = 128  # the most of a user turn that the model writes

Array = npt.NDArray[Any]
ProgressCallback = Callable[[int], object]  # told how many tokens were given or written since the last call


@dataclass(frozen=True)
class Request:
    """One conversation to write.

    turns: the given user turns, none where the model writes the first one too. temperature: of the answers.
    """

    turns: Turns
    temperature: float


@dataclass(frozen=True)
class Segment:
    """Tokens to force, and then what the model writes: kind USER or ANSWER, at most `limit` tokens, at least 1."""

    given: Ids
    kind: int
    temperature: float
    limit: int


Script = tuple[Segment, ...]


@dataclass(frozen=True)
class GeneratedRow:
    """A written row: its tokens and their roles (uint8), position by position."""

    tokens: Ids
    roles: Array

    def to_last_answer(self) -> GeneratedRow:
        """Cut what follows the last token of an answer."""
        answers = np.flatnonzero(self.roles == ANSWER)
        end = int(answers[-1]) + 1 if len(answers) else 0
        return GeneratedRow(self.tokens[:end], self.roles[:end])


class RowGenerator(Protocol):
    """Writes waves of rows."""

    def write(self, scripts: Sequence[Script], tick: ProgressCallback) -> list[GeneratedRow]:
        """Write one line a script, of at most the context's positions, up to its last answer token."""


@dataclass(frozen=True)
class ScriptSettings:
    """How scripts are made: rows of `context` positions, answers of at most `max_new_tokens`.

    frame: None where the template cannot be cut; then only first turns are answered. follow_ups: go on with user turns
    of the model's own until the row is full.
    """

    context: int
    max_new_tokens: int
    frame: TemplateParts | None
    follow_ups: bool


def shuffle_requests(
    conversations: Iterable[Turns], synthesize: int, temperatures: Sequence[float], seed: int
) -> list[Request]:
    """One stream a conversation and temperature, and `synthesize` more, which take the temperatures in turn."""
    streams = [Request(turns, temperature) for turns in conversations for temperature in temperatures]
    streams += [Request((), temperatures[number % len(temperatures)]) for number in range(synthesize)]
    random.Random(seed).shuffle(streams)  # noqa: S311 -- so that a run cut short has a fair share of all
    return streams


def drop_long_prompts(tokenizer: Any, conversations: list[Turns], room: int) -> list[Turns]:
    """Leave out conversations whose first turn takes more than `room` tokens."""
    laid_out = prompt_ids(tokenizer, [[{"role": "user", "content": turns[0]}] for turns in conversations])
    return [turns for turns, ids in zip(conversations, laid_out, strict=True) if len(ids) <= room]


def make_scripts(tokenizer: Any, streams: Sequence[Request], terms: ScriptSettings) -> list[Script]:
    """The scripts of streams, each long enough to fill its row if it can."""
    firsts = iter(prompt_ids(tokenizer, [[{"role": "user", "content": s.turns[0]}] for s in streams if s.turns]))
    scripts = []
    for stream in streams:
        given = [np.array(next(firsts), np.int64)] if stream.turns else []
        if terms.frame and len(stream.turns) > 1:
            given += later_turns(tokenizer, stream.turns, terms.frame.ends.eos)
        answers = [Segment(ids, ANSWER, stream.temperature, terms.max_new_tokens) for ids in given]
        scripts.append((*answers, *_own_turns(stream, terms)))
    return scripts


def _own_turns(stream: Request, terms: ScriptSettings) -> Script:
    """Parts that follow the given turns: user turns that the model writes, each with its answer."""
    frame = terms.frame
    if frame is None or not (terms.follow_ups or not stream.turns):
        return ()
    answer = Segment(frame.middle, ANSWER, stream.temperature, terms.max_new_tokens)
    user = Segment(frame.following, USER, USER_TEMPERATURE, USER_TOKENS)
    shortest = len(user.given) + len(answer.given) + 2  # of a user turn and its answer
    pairs = -(-terms.context // shortest) if terms.follow_ups else 0
    opening = () if stream.turns else (Segment(frame.opening, USER, USER_TEMPERATURE, USER_TOKENS), answer)
    return opening + (user, answer) * pairs


def end_token_of(kind: int, ends: EndTokens) -> int | None:
    """The token by which the template ends a written part of `kind`."""
    return {USER: ends.user, ANSWER: ends.answer}.get(kind)
