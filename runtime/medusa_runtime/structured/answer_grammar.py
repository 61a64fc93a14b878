"""Follows one answer through a grammar: which tokens may come next, and which ones must."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np

from medusa_runtime.backends.base import BoolArray
from medusa_runtime.errors import RequestError
from medusa_runtime.structured.library import refused, shortened

_EXPECTED = "something that may follow, and that is not too complex: simplify the schema or grammar"


class AnswerGrammar:
    """A matcher of llguidance that goes to whichever beginning of the answer it is asked about.

    A tree is walked token by token, and a step that fails is repeated, so questions go forward and back again. What the
    last question has in common with the next one stays as it is; the rest is rolled back.

    Args:
        matcher: A matcher in its initial state, which nothing else uses.
        tokenizer: The tokenizer, as llguidance reads it.
        vocab_size: V.
        end_ids: The model's end tokens, which are allowed exactly where an answer may end.
    """

    def __init__(self, matcher: Any, tokenizer: Any, vocab_size: int, end_ids: Collection[int]) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._vocab_size, self._end_ids = vocab_size, frozenset(end_ids)
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

    def forced(self, output: Sequence[int]) -> list[int]:
        """Return tokens that the grammar leaves no choice about, which any answer goes on with.

        Behind those that are certain come tokens of characters that are certain, where the model may prefer a longer
        token that begins with them; and the end token, behind a complete answer.

        Args:
            output: The answer's tokens so far.
        """
        if self._is_ended(output):
            return []
        matcher = self._matcher
        with self._behind(output):
            tokens = [int(token) for token in matcher.compute_ff_tokens()]
            self._consume(tokens)
            if characters := matcher.compute_ff_bytes():
                guessed = [int(token) for token in self._tokenizer.tokenize_bytes(characters)]
                guessed = guessed[: matcher.validate_tokens(guessed)]
                self._consume(guessed)
                tokens += guessed
            if matcher.is_stopped():
                tokens.append(min(self._end_ids))
        return tokens

    def allowed(self, output: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of the first of some tokens may follow one another behind `output`, the end apart."""
        if self._is_ended(output):
            return 0
        with self._behind(output):
            return int(self._matcher.validate_tokens(list(takewhile(lambda token: token not in self._end_ids, tokens))))

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
                self._consumed = []  # also after an interrupt, which leaves nothing that is known
                self._matcher.reset()
            elif common < len(known):
                self._consumed = []
                self._matcher.rollback(len(known) - common)
                self._consumed = known[:common]
            self._consume(output[common:])
            yield
            if self._matcher.is_error():
                raise RequestError(f"{what}: {shortened(self._matcher.get_error())}; expected {_EXPECTED}")

    def _consume(self, tokens: Sequence[int]) -> None:
        if tokens:
            known, self._consumed = self._consumed, []
            if self._matcher.try_consume_tokens(list(tokens)) < len(tokens):  # unlike consume_tokens it may fail
                raise ValueError(self._matcher.get_error() or "one of them is not allowed")
            self._consumed = [*known, *tokens]
