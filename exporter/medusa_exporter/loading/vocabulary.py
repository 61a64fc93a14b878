"""Compares the token ids of a tokenizer with the vocabulary of a model."""

from __future__ import annotations

from typing import Any

SHOWN = 3  # tokens in a message


def describe_ids_beyond(tokenizer: Any, vocabulary: int) -> str:
    """List the first tokens whose ids are not below `vocabulary`, for a message; "" if there are none.

    Some published models have such tokens, for padding or images, that text prompts do not contain.
    """
    beyond = sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= vocabulary)
    more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    return ", ".join(f"{text!r} ({token})" for token, text in beyond[:SHOWN]) + more


def needed_vocab_size(tokenizer: Any) -> int:
    """Return the size of a vocabulary that holds all tokens of a tokenizer: the largest token id + 1."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)
