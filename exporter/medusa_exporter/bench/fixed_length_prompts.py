"""Makes prompts of an exact number of tokens from the text of a prompt file."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_runtime.errors import PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

from medusa_exporter.bench.timing import rotated
from medusa_exporter.prompts import Turns


def prompts_of_length(encoder: PromptEncoder, conversations: Sequence[Turns], length: int) -> list[list[int]]:
    """Return one prompt of exactly `length` tokens for each conversation.

    A prompt begins with the text of its conversation, and the next conversations follow until it is long enough. Where
    the bundle has a chat template, the text is one user message and the prompt ends where the answer begins.

    Raises:
        PromptError: The chat template alone takes `length` tokens or more.
    """
    return [_prompt(encoder, rotated(conversations, number), length) for number in range(len(conversations))]


def _prompt(encoder: PromptEncoder, conversations: Sequence[Turns], length: int) -> list[int]:
    messages = [turn for turns in conversations for turn in turns]
    counts = [len(encoder.tokenizer.encode(message, add_special_tokens=False)) + 1 for message in messages]
    used, tokens = 0, 0
    while tokens <= 2 * length:  # a tokenizer may merge tokens across messages: twice as many are enough
        tokens += counts[used % len(messages)]
        used += 1
    text = "\n\n".join(messages[number % len(messages)] for number in range(used))
    ids = _encode(encoder, text)
    ending = _common_ending(ids, _encode(encoder, ".")) if encoder.has_chat_template else 0
    least = len(_encode(encoder, ".")) + 1
    if length < least or len(ids) < length:
        raise PromptError(
            f"a prompt of {length} tokens is too short: the chat template and one word take {least}; use a larger "
            "--prompt-length or --max-length"
        )
    return ids[: length - ending] + ids[len(ids) - ending :]


def _encode(encoder: PromptEncoder, text: str) -> list[int]:
    return encoder.encode(text, raw=not encoder.has_chat_template)


def _common_ending(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the equal tokens at the end of both, which the chat template has put there."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
