"""Prompts of an exact length, made of a file's own text."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime.errors import PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.timing import rotated
from medusa_exporter.prompts import Turns


def prompts_of_length(encoder: PromptEncoder, conversations: Sequence[Turns], length: int) -> list[list[int]]:
    """One prompt of exactly `length` tokens for each conversation: it begins with this one, and others follow.

    Where the bundle has a chat template, the text is a user's message and the prompt ends where the answer begins.
    Raises PromptError where the template alone has no room.
    """
    return [_text(encoder, rotated(conversations, number), length) for number in range(len(conversations))]


def _text(encoder: PromptEncoder, conversations: Sequence[Turns], length: int) -> list[int]:
    messages = [turn for turns in conversations for turn in turns]
    counts = [len(encoder.tokenizer.encode(message, add_special_tokens=False)) + 1 for message in messages]
    taken, tokens = 0, 0
    while tokens <= 2 * length:  # a tokenizer may join across messages: twice as much is enough
        tokens += counts[taken % len(messages)]
        taken += 1
    text = "\n\n".join(messages[number % len(messages)] for number in range(taken))
    ids = _laid_out(encoder, text)
    ending = _common_ending(ids, _laid_out(encoder, ".")) if encoder.has_chat_template else 0
    least = len(_laid_out(encoder, ".")) + 1
    if length < least or len(ids) < length:
        raise PromptError(
            f"no prompt of {length} tokens can be laid out: the template and one word take {least}; ask for more"
        )
    return ids[: length - ending] + ids[len(ids) - ending :]


def _laid_out(encoder: PromptEncoder, text: str) -> list[int]:
    return encoder.encode(text, raw=not encoder.has_chat_template)


def _common_ending(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
