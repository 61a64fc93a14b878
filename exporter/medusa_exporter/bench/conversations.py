"""Asks every backend the user messages of each conversation; all backends answer a message before the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from medusa_runtime.errors import CapacityError, PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.timing import Measurement, Question, rotated
from medusa_exporter.prompts import Turns

PLAIN_TEXT = "the bundle has no chat template: prompts are plain text, with a paragraph for each message and answer"

BackendMeasurements = dict[str, Measurement]  # by backend, in the order of the command line


class Answerer(Protocol):
    """A backend that answers questions."""

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer with plain decoding and with each tree; None when the backend has failed, now or before."""


@dataclass(frozen=True)
class Skipped:
    """A message that leaves no room for an answer in the context.

    Attributes:
        prompt: Number of the conversation, from 1.
        turn: Number of the message in the conversation, from 1.
        tokens: Length of the prompt; None if the text is so long that it was not tokenised.
        context: Length of the context.
    """

    prompt: int
    turn: int
    tokens: int | None
    context: int

    def describe(self) -> str:
        """Describe in a few words what was skipped and why."""
        tokens = f"more than {self.context}" if self.tokens is None else self.tokens
        return f"SKIPPED: {tokens} tokens of prompt leave no room for an answer in the context of {self.context}"


def converse(
    backends: Mapping[str, Answerer],
    encoder: PromptEncoder,
    context: int,
    conversations: Iterable[Turns],
    *,
    max_new_tokens: int,
    first_only: bool = False,
    stop_at_eos: bool = True,
) -> Iterator[BackendMeasurements | Skipped]:
    """Ask all user messages of all conversations, until every backend has failed.

    All backends answer the same token ids: the later messages of a conversation follow the first backend's plain
    answers. A message that does not fit the context is skipped, with the rest of its conversation.

    Args:
        backends: The backends, by name.
        encoder: The bundle's tokenizer and chat template.
        context: Maximum number of tokens of prompt and answer.
        conversations: The user messages of each conversation.
        max_new_tokens: Maximum number of tokens of an answer.
        first_only: Whether only the first message of each conversation is asked.
        stop_at_eos: Whether end tokens end an answer.

    Raises:
        PromptError: A prompt cannot be written by the chat template; the error names it.
    """
    for number, turns in enumerate(conversations, start=1):
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(turns[:1] if first_only else turns, start=1):
            messages.append({"role": "user", "content": text})
            try:
                ids = encode_conversation(encoder, messages)
            except PromptError as error:
                raise PromptError(f"prompt {number}, turn {turn}: {error}") from error
            except CapacityError:
                yield Skipped(number, turn, None, context)
                break
            if len(ids) >= context:
                yield Skipped(number, turn, len(ids), context)
                break
            answers = ask(backends, Question(number, turn, tuple(ids), max_new_tokens, stop_at_eos))
            if not answers:
                return
            yield answers
            plain = next(iter(answers.values())).plain
            messages.append({"role": "assistant", "content": encoder.tokenizer.decode(plain.tokens)})


def encode_conversation(encoder: PromptEncoder, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of a conversation, by the chat template, or as plain text where there is none."""
    if encoder.has_chat_template:
        return encoder.encode(messages)
    return encoder.encode("\n\n".join(message["content"].strip() for message in messages), raw=True)


def ask_each(
    backends: Mapping[str, Answerer], prompts: Iterable[Sequence[int]], max_new_tokens: int
) -> Iterator[BackendMeasurements]:
    """Ask prompts of token ids, each answered with exactly `max_new_tokens`, until every backend has failed."""
    for number, ids in enumerate(prompts, start=1):
        answers = ask(backends, Question(number, 1, tuple(ids), max_new_tokens, stop_at_eos=False))
        if not answers:
            return
        yield answers


def ask(backends: Mapping[str, Answerer], question: Question) -> BackendMeasurements:
    """Let the backends answer one after the other; the order is rotated from prompt to prompt."""
    shift = question.prompt - 1
    found = {name: backends[name].answer(question, shift) for name in rotated([*backends], shift)}
    return {name: measured for name in backends if (measured := found[name]) is not None}
