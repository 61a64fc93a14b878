"""Follows one answer through a grammar: which tokens may come next, and which ones must."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from medusa_runtime.backends.base import BoolArray
from medusa_runtime.errors import RequestError
from medusa_runtime.structured.habits import Habits
from medusa_runtime.structured.library import refused, shortened

_EXPECTED = "something that may follow, and that is not too complex: simplify the schema or grammar"


class Forced(NamedTuple):
    """Tokens that follow where a grammar leaves no choice, or nearly none.

    Args:
        tokens: The tokens.
        guesses: Indices of those that are not the only ones which are allowed; all others are certain.
    """

    tokens: Sequence[int]
    guesses: Sequence[int]


NOT_FORCED = Forced((), ())


class AnswerGrammar:
    """A matcher of llguidance that goes to whichever beginning of the answer it is asked about.

    A tree is walked token by token, and a step that fails is repeated, so questions go forward and back again. What the
    last question has in common with the next one stays as it is; the rest is rolled back.

    Args:
        initial: A matcher in its initial state, which is only copied.
        habits: What answers to the same grammar wrote before; what this one writes is added.
        vocab_size: V.
        end_ids: The model's end tokens, which are allowed exactly where an answer may end.
    """

    def __init__(self, initial: Any, habits: Habits, vocab_size: int, end_ids: Collection[int]) -> None:
        self._initial, self._matcher, self._habits = initial, initial.deep_copy(), habits
        self._vocab_size, self._end_ids = vocab_size, frozenset(end_ids)
        self._learned = 0  # number of tokens of the answer that the habits have
        self._consumed: list[int] = []

    def mask(self, output: Sequence[int]) -> BoolArray | None:
        """Return which tokens may follow, (V,) bool; None behind an end token, where nothing is chosen any more.

        Args:
            output: The answer's tokens so far, all of which were allowed.

        Raises:
            RequestError: No token is allowed, or the grammar has become too complex.
        """
        if self._is_ended(output):
            return None
        with self._behind(output):
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def forced(self, output: Sequence[int], most: int) -> Forced:
        """Return what follows where the grammar leaves no choice, or nearly none; an end too, behind a complete answer.

        It is a look ahead, and the answer may end before: where the grammar cannot be followed, there is nothing.

        Args:
            output: The answer's tokens so far.
            most: Maximum number of tokens.
        """
        if self._is_ended(output) or most <= 0:
            return NOT_FORCED
        try:
            self._learn(output)
            return self._look_ahead(output, most)
        except RequestError:
            return NOT_FORCED

    def _look_ahead(self, output: Sequence[int], most: int) -> Forced:
        found, guesses = list[int](), list[int]()
        with self._behind(output):
            while len(found) < most:
                certain = [int(token) for token in self._matcher.compute_ff_tokens()][: most - len(found)]
                self._consume(certain)
                found += certain
                if len(found) == most:
                    break
                if self._matcher.is_stopped():
                    found.append(min(self._end_ids))
                    break
                last = found[-1] if found else output[-1] if output else None
                guess = self._habits.guess(self._matcher.compute_ff_bytes(), last)
                if guess is None or not self._matcher.validate_tokens([guess]):
                    break
                guesses.append(len(found))
                self._consume([guess])
                found.append(guess)
        return Forced(found, guesses)

    def _learn(self, output: Sequence[int]) -> None:
        """Remember what was chosen at the tokens of the answer that are new."""
        for at in range(self._learned, len(output)):
            with self._behind(output[:at]):
                if not self._matcher.compute_ff_tokens():
                    characters = self._matcher.compute_ff_bytes()
                    self._habits.learn(characters, output[at - 1] if at else None, output[at])
        self._learned = len(output)

    def allowed(self, output: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of the first of some tokens may follow one another behind `output`, the end apart."""
        if self._is_ended(output):
            return 0
        try:
            with self._behind(output):
                return int(self._matcher.validate_tokens([*takewhile(lambda one: one not in self._end_ids, tokens)]))
        except RequestError:  # a look ahead
            return 0

    def _is_ended(self, output: Sequence[int]) -> bool:
        """Whether there is an end token: a tree may go on behind one, where no token will be kept."""
        return not self._end_ids.isdisjoint(output)

    @contextmanager
    def _behind(self, output: Sequence[int]) -> Iterator[None]:
        """Move the matcher behind `output`; raise RequestError if it fails there, or at what is asked of it then."""
        what = f"structured_outputs cannot be followed behind the first {len(output)} tokens of the answer"
        with refused(what, _EXPECTED, RequestError):
            known = self._consumed
            common = len(known)
            if known != output[:common]:
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, output, strict=False)))
            if not common:
                self._begin_again()  # also after an interrupt, which leaves nothing that is known
            elif common < len(known):
                self._consumed = []
                self._matcher.rollback(len(known) - common)
                self._consumed = known[:common]
            try:
                self._consume(output[common:])
                yield
                self._check(what)
            except BaseException:
                self._begin_again()  # nothing can be asked of a matcher that has failed
                raise

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise RequestError(f"{what}: {shortened(self._matcher.get_error())}; expected {_EXPECTED}")

    def _begin_again(self) -> None:
        self._consumed = []
        self._matcher = self._initial.deep_copy()

    def _consume(self, tokens: Sequence[int]) -> None:
        if tokens:
            known, self._consumed = self._consumed, []
            if self._matcher.try_consume_tokens(list(tokens)) < len(tokens):  # unlike consume_tokens it may fail
                raise ValueError(self._matcher.get_error() or "one of them is not allowed")
            self._consumed = [*known, *tokens]
