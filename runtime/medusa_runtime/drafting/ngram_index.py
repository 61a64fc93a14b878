"""Finds where the last tokens of a sequence occurred before: what followed there is a guess at what follows now.

Prompt lookup decoding (Saxena, 2023): summaries, edited code and answers about documents repeat their prompt. A copied
continuation costs no computation, and a step verifies it like any other draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SIZES = (3, 2)  # lengths of the n-grams that are looked up, the longest first
MAX_MATCH = 16  # tokens up to which a match is measured


class Match(NamedTuple):
    """An earlier occurrence of the last tokens.

    Args:
        position: Index of the token that followed it.
        length: How many tokens before that equal the last ones, at most MAX_MATCH.
    """

    position: int
    length: int


class NgramIndex:
    """The latest position of every n-gram of a sequence that only grows; a token costs a constant time.

    Args:
        tokens: The first tokens of the sequence.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # the position behind each n-gram
        self.extend(tokens)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. The n-grams that end at the last one are not found before a token follows them."""
        known, latest = self._tokens, self._latest
        for token in tokens:
            end = len(known)
            for size in SIZES:
                if size <= end:
                    latest[tuple(known[end - size :])] = end
            known.append(token)

    def match(self) -> Match | None:
        """Return the latest earlier occurrence of the last tokens, of the longest n-gram that has one."""
        tokens, end = self._tokens, len(self._tokens)
        for size in SIZES:
            position = self._latest.get(tuple(tokens[end - size :])) if size <= end else None
            if position is not None:
                length = size
                while length < min(MAX_MATCH, position) and tokens[position - length - 1] == tokens[end - length - 1]:
                    length += 1
                return Match(position, length)
        return None

    def continuation(self, position: int, length: int) -> Sequence[int]:
        """Return at most `length` tokens from a position on, those that exist so far."""
        return self._tokens[position : position + length]
