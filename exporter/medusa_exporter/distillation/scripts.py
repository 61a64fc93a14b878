"""Scripts of conversations: which tokens a row is forced to hold and which segments the model generates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_exporter.distillation.template_parts import EndTokens, Ids, TemplateParts, later_turns
from medusa_exporter.prompts import Turns, prompt_ids

FORCED, USER, ANSWER = 0, 1, 2  # role of a token: forced, or generated as part of a user turn or of an answer
USER_TEMPERATURE = 0.9
USER_TOKENS = 128  # maximum number of tokens of a user turn that the model generates

Array = npt.NDArray[Any]
ProgressCallback = Callable[[int], object]  # receives the number of tokens added since the last call


@dataclass(frozen=True)
class Request:
    """One conversation to generate.

    Attributes:
        turns: The given user turns; empty if the model generates the first one too.
        temperature: Sampling temperature of the answers.
    """

    turns: Turns
    temperature: float


@dataclass(frozen=True)
class Segment:
    """Tokens to force, followed by tokens that the model generates.

    Attributes:
        forced: Token ids to force.
        kind: What the model generates after them, `USER` or `ANSWER`.
        temperature: Sampling temperature.
        limit: Maximum number of tokens to generate, at least 1.
    """

    forced: Ids
    kind: int
    temperature: float
    limit: int


Script = tuple[Segment, ...]


@dataclass(frozen=True)
class GeneratedRow:
    """A generated row: token ids (n,) and their roles (n,) uint8."""

    tokens: Ids
    roles: Array

    def to_last_answer(self) -> GeneratedRow:
        """Return the row up to the last token of an answer."""
        answers = np.flatnonzero(self.roles == ANSWER)
        end = int(answers[-1]) + 1 if len(answers) else 0
        return GeneratedRow(self.tokens[:end], self.roles[:end])


class RowGenerator(Protocol):
    """Generates batches of rows from scripts."""

    def generate(self, scripts: Sequence[Script], progress: ProgressCallback) -> list[GeneratedRow]:
        """Generate one row per script, of at most the context's tokens and up to its last answer token."""


@dataclass(frozen=True)
class ScriptSettings:
    """How scripts are made.

    Attributes:
        context: Maximum number of tokens of a row.
        max_new_tokens: Maximum number of tokens of an answer.
        template: The parts of the chat template; `None` if it cannot be split, so that only first turns are answered.
        follow_ups: Let the model generate further user turns until the row is full.
    """

    context: int
    max_new_tokens: int
    template: TemplateParts | None
    follow_ups: bool


def shuffle_requests(
    conversations: Iterable[Turns], synthesize: int, temperatures: Sequence[float], seed: int
) -> list[Request]:
    """Make one request per conversation and temperature and `synthesize` without turns, in random order.

    The requests without turns use the temperatures one after another.
    """
    requests = [Request(turns, temperature) for turns in conversations for temperature in temperatures]
    requests += [Request((), temperatures[number % len(temperatures)]) for number in range(synthesize)]
    random.Random(seed).shuffle(requests)  # noqa: S311 -- so that a run cut short has a fair share of all
    return requests


def drop_long_prompts(tokenizer: Any, conversations: list[Turns], longest: int) -> list[Turns]:
    """Return the conversations whose first turn takes at most `longest` tokens, chat template included."""
    prompts = prompt_ids(tokenizer, [[{"role": "user", "content": turns[0]}] for turns in conversations])
    return [turns for turns, ids in zip(conversations, prompts, strict=True) if len(ids) <= longest]


def make_scripts(tokenizer: Any, requests: Sequence[Request], settings: ScriptSettings) -> list[Script]:
    """Make the script of each request, long enough to fill its row where follow-ups are possible."""
    firsts = iter(prompt_ids(tokenizer, [[{"role": "user", "content": r.turns[0]}] for r in requests if r.turns]))
    scripts = []
    for request in requests:
        forced = [np.array(next(firsts), np.int64)] if request.turns else []
        if settings.template and len(request.turns) > 1:
            forced += later_turns(tokenizer, request.turns, settings.template.ends.eos)
        answers = [Segment(ids, ANSWER, request.temperature, settings.max_new_tokens) for ids in forced]
        scripts.append((*answers, *_generated_turns(request, settings)))
    return scripts


def _generated_turns(request: Request, settings: ScriptSettings) -> Script:
    """Return the segments after the given turns: user turns that the model generates, each with its answer."""
    template = settings.template
    if template is None or not (settings.follow_ups or not request.turns):
        return ()
    answer = Segment(template.user_to_answer, ANSWER, request.temperature, settings.max_new_tokens)
    user = Segment(template.answer_to_user, USER, USER_TEMPERATURE, USER_TOKENS)
    shortest = len(user.forced) + len(answer.forced) + 2  # tokens of a user turn and its answer
    pairs = -(-settings.context // shortest) if settings.follow_ups else 0
    opening = () if request.turns else (Segment(template.before_user, USER, USER_TEMPERATURE, USER_TOKENS), answer)
    return opening + (user, answer) * pairs


def end_token_of(kind: int, ends: EndTokens) -> int | None:
    """Return the token by which the chat template ends a generated segment of `kind`."""
    return {USER: ends.user, ANSWER: ends.answer}.get(kind)
