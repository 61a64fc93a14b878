"""Whether a tokenizer and a model speak of the same token ids."""

from __future__ import annotations

from typing import Any

SHOWN = 3  # tokens in a message


def describe_ids_beyond(tokenizer: Any, vocabulary: int) -> str:
    """Name the tokenizer's tokens whose ids lie outside 0 … `vocabulary` - 1, the first few; empty where none does.

    Some published models have such tokens (for padding, or for images), which no prompt of theirs needs.
    """
    beyond = sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= vocabulary)
    more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    return ", ".join(f"{text!r} ({token})" for token, text in beyond[:SHOWN]) + more


def needed_vocab_size(tokenizer: Any) -> int:
    """How many ids a vocabulary needs to hold all of a tokenizer's tokens: one more than the largest of them."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)
