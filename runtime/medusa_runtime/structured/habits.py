"""What answers wrote where a grammar left little choice: a guess at what they write there again."""

from __future__ import annotations

from typing import Any

MAX_KEY = 16  # forced characters that tell one place from another
_FIXED = frozenset(b' \t\r\n{}[]":,')  # characters of JSON that are not content


class Habits:
    """Remembers the tokens that answers to one grammar chose between those that were certain.

    A grammar may force characters, but leave open where their token ends: `"` may be followed by a colon, or by white
    space. What was written there the last time is likely to be right the next time. Where no character is forced,
    only what follows a token of brackets, quotes, commas and white space is remembered, and only if it is one, too:
    these are the line breaks and the indentation of JSON.

    Args:
        tokenizer: The tokenizer, as llguidance reads it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chosen: dict[bytes | int, int] = {}  # behind forced characters, or behind a token

    def learn(self, characters: bytes, last: int | None, token: int) -> None:
        """Remember a choice.

        Args:
            characters: What was forced.
            last: The token before, None at the beginning.
            token: The token that was chosen.
        """
        if characters:
            self._chosen[characters[:MAX_KEY]] = token
        elif last is not None and self._is_fixed(last) and self._is_fixed(token):
            self._chosen[last] = token

    def guess(self, characters: bytes, last: int | None) -> int | None:
        """Return a token that may be chosen, None for no idea; arguments are those of `learn`."""
        known = self._chosen.get(characters[:MAX_KEY] or (-1 if last is None else last))
        if known is None and characters:
            return int(self._tokenizer.tokenize_bytes(characters)[0])
        return known

    def _is_fixed(self, token: int) -> bool:
        return _FIXED.issuperset(self._tokenizer.decode_bytes([token]))
