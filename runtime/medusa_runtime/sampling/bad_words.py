"""The token sequences of bad words, as vLLM derives them."""

from __future__ import annotations

from collections.abc import Iterable

from medusa_profiles.profile import shown

from medusa_runtime.errors import ArgumentError
from medusa_runtime.tokenizer import Tokenizer


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences that an answer must not contain.

    Each word is tokenised without a space before it, as at the beginning of a text. The sequence with a space, as in
    the middle of a text, is added where it has as many tokens and begins with another one: where it does not, the
    space is a token of its own, or the word is split in another way, which is not forbidden (in vLLM neither).

    Args:
        words: The words; white space before them does not count.
        tokenizer: The tokenizer of the model.

    Raises:
        ArgumentError: A word is white space only, or has no tokens.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        if not word.lstrip():
            raise ArgumentError(
                f"bad_words holds {shown(word)}, which is white space only, and white space at the beginning of a word "
                "is ignored, as in vLLM; expected a word: give the tokens of white space a logit_bias of -100, or "
                "leave them out of allowed_token_ids"
            )
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not bare:
            raise ArgumentError(f"bad_words holds {shown(word)}, which has no tokens; expected a word: leave it out")
        found.append(bare)
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
    return tuple(dict.fromkeys(found))
