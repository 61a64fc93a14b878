"""Which tokens prompt and answer hold, and how often: what penalties depend on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.intp]

_INITIAL = 64  # elements of the arrays, which double when they are full


class TokenCounts:
    """The distinct tokens of prompt and answer, kept up to date token by token.

    Args:
        prompt_ids: Tokens of the prompt.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prompt = np.unique(np.asarray(prompt_ids, dtype=np.intp))
        self._in_prompt = frozenset(self._prompt.tolist())
        self._clear()

    def _clear(self) -> None:
        self._counted: list[int] = []  # the answer's tokens that are counted
        self._places: dict[int, int] = {}  # where the arrays below hold a token
        self._tokens = np.zeros(_INITIAL, dtype=np.intp)
        self._counts = np.zeros(_INITIAL, dtype=np.int64)
        self._seen = np.resize(self._prompt, len(self._prompt) + _INITIAL)
        self._seen_count = len(self._prompt)

    def synchronise(self, output: Sequence[int]) -> None:
        """Count the tokens of an answer.

        Only new ones are counted if the answer continues the one of the last call; otherwise, as after a step that was
        interrupted, all are.
        """
        known = len(self._counted)
        if list(output[:known]) != self._counted:
            self._clear()
            known = 0
        for token in output[known:]:
            self._add(int(token))

    def _add(self, token: int) -> None:
        self._counted.append(token)
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens, self._counts = _doubled(self._tokens), _doubled(self._counts)
        self._tokens[place] = token
        self._counts[place] += 1
        if self._counts[place] == 1 and token not in self._in_prompt:
            if self._seen_count == len(self._seen):
                self._seen = _doubled(self._seen)
            self._seen[self._seen_count] = token
            self._seen_count += 1

    @property
    def seen(self) -> IdArray:
        """Distinct tokens of prompt and answer together."""
        return self._seen[: self._seen_count]

    @property
    def answered(self) -> IdArray:
        """Distinct tokens of the answer."""
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often the answer holds each of `answered`."""
        return self._counts[: len(self._places)]


def _doubled(array: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([array, np.zeros_like(array)])
