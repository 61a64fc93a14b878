"""From prompts to turns: every backend answers a prompt before the next one is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from medusa_runtime.errors import CapacityError, PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.timing import Measurement, Question, rotated
from medusa_exporter.prompts import Turns

PLAIN_TEXT = "the bundle has no chat template: prompts are plain text, each message and answer a paragraph of it"

BackendMeasurements = dict[str, Measurement]  # by backend, in the order in which these were named


class Answerer(Protocol):
    """A backend that takes questions; it gives None from the moment on when it has failed."""

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer by plain decoding and by every tree."""


@dataclass(frozen=True)
class Skipped:
    """A message that leaves no room for an answer: `tokens` of prompt against the model's `context`.

    tokens is None where the text is so long that it was not even tokenised.
    """

    prompt: int
    turn: int
    tokens: int | None
    context: int

    def describe(self) -> str:
        """Say in a few words what was skipped and why."""
        tokens = f"more than {self.context}" if self.tokens is None else self.tokens
        return f"SKIPPED, {tokens} tokens of prompt leave no room in the context of {self.context}"


def converse(
    backends: Mapping[str, Answerer],
    encoder: PromptEncoder,
    context: int,
    conversations: Iterable[Turns],
    *,
    max_new_tokens: int,
    first_only: bool = False,
    ends: bool = True,
) -> Iterator[BackendMeasurements | Skipped]:
    """Ask every user message of every conversation; ends when no backend is left.

    All answer the same tokens: from the second message on, the conversation holds the first backend's plain answers. A
    message too long for the context is skipped, with what follows it. Raises PromptError naming the prompt that
    cannot be laid out.
    """
    for number, turns in enumerate(conversations, start=1):
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(turns[:1] if first_only else turns, start=1):
            messages.append({"role": "user", "content": text})
            try:
                ids = encode(encoder, messages)
            except PromptError as error:
                raise PromptError(f"prompt {number}, turn {turn}: {error}") from error
            except CapacityError:
                yield Skipped(number, turn, None, context)
                break
            if len(ids) >= context:
                yield Skipped(number, turn, len(ids), context)
                break
            answers = ask(backends, Question(number, turn, tuple(ids), max_new_tokens, ends))
            if not answers:
                return
            yield answers
            plain = next(iter(answers.values())).plain
            messages.append({"role": "assistant", "content": encoder.tokenizer.decode(plain.tokens)})


def encode(encoder: PromptEncoder, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation: by the chat template, or as plain text where the bundle has none (`PLAIN_TEXT`)."""
    if encoder.has_chat_template:
        return encoder.encode(messages)
    return encoder.encode("\n\n".join(message["content"].strip() for message in messages), raw=True)


def ask_each(
    backends: Mapping[str, Answerer], prompts: Iterable[Sequence[int]], max_new_tokens: int
) -> Iterator[BackendMeasurements]:
    """Ask prompts of token ids, each answered with exactly `max_new_tokens`; ends when no backend is left."""
    for number, ids in enumerate(prompts, start=1):
        answers = ask(backends, Question(number, 1, tuple(ids), max_new_tokens, ends=False))
        if not answers:
            return
        yield answers


def ask(backends: Mapping[str, Answerer], question: Question) -> BackendMeasurements:
    """Let every backend answer, one after the other; who comes first rotates from prompt to prompt."""
    shift = question.prompt - 1
    found = {name: backends[name].answer(question, shift) for name in rotated([*backends], shift)}
    return {name: turn for name in backends if (turn := found[name]) is not None}
