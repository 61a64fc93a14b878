"""What changes logits before a token is chosen, greedily too: vLLM's processors, in vLLM's order.

structured_outputs, allowed_token_ids, bad_words and min_tokens forbid tokens: their logits become -inf, which no later
processor changes. So forbidding comes last here, with the same result, and the processors in between see finite numbers
only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.errors import ArgumentError, RequestError
from medusa_runtime.sampling.scratch import thread_scratch
from medusa_runtime.sampling.token_counts import IdArray, TokenCounts
from medusa_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from medusa_runtime.structured.answer_grammar import AnswerGrammar

_LIMIT = float(np.finfo(np.float32).max)
_MOST_FACTOR = 1e200  # of a repetition penalty: float32 times it, or divided by its inverse, is finite in float64


class Processors:
    """The processors of one answer.

    Args:
        params: Parameters of the request.
        prompt_ids: Tokens of the prompt; the repetition penalty applies to them too.
        vocab_size: V.
        end_ids: Tokens that `min_tokens` forbids: end tokens and stop tokens.
        bad_word_ids: Token sequences that the answer must not contain; `bad_words.bad_word_ids` makes them.
        grammar: Follows the answer through what it has to match; None if it may be anything.

    Raises:
        ArgumentError: The parameters forbid every token from the beginning, whatever the grammar allows.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        end_ids: Collection[int],
        bad_word_ids: Sequence[Sequence[int]],
        grammar: AnswerGrammar | None = None,
    ) -> None:
        self._vocab_size, self._grammar = vocab_size, grammar
        self._allowed = None if params.allowed_token_ids is None else _ids(params.allowed_token_ids, vocab_size)
        self._min_tokens, self._ends = params.min_tokens, _ids(end_ids, vocab_size)
        self._bad_tokens = _ids([words[0] for words in bad_word_ids if len(words) == 1], vocab_size)
        self._bad_endings: dict[int, list[tuple[list[int], int]]] = {}  # by the last but one token of the sequence
        for words in bad_word_ids:
            if len(words) > 1 and words[-1] < vocab_size:
                prefix = [int(token) for token in words[:-1]]
                self._bad_endings.setdefault(prefix[-1], []).append((prefix, int(words[-1])))
        bias = dict(params.logit_bias or ())
        self._bias_ids = _ids(bias, vocab_size)
        self._bias = np.array([bias[token] for token in self._bias_ids.tolist()], dtype=np.float32)
        self._repetition = min(max(params.repetition_penalty, 1 / _MOST_FACTOR), _MOST_FACTOR)
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._counts = TokenCounts(prompt_ids) if params.has_penalties else None
        self._check_first_token()

    def _check_first_token(self) -> None:
        forbidden = {token for ids in self._forbidden(()) for token in ids.tolist()}
        if self._allowed is None:
            none_left = len(forbidden) == self._vocab_size
        else:
            none_left = forbidden.issuperset(self._allowed.tolist())
        if none_left:
            raise ArgumentError(self._nothing_left("at the answer's beginning"))

    def _nothing_left(self, where: str) -> str:
        """Return the message of an error that names the parameters which forbid tokens."""
        forbidding = {
            "structured_outputs": self._grammar is not None,
            "allowed_token_ids": self._allowed is not None,
            "bad_words": len(self._bad_tokens) > 0 or bool(self._bad_endings),
            "min_tokens": self._min_tokens > 0,
        }
        names = " and ".join(name for name, is_set in forbidding.items() if is_set)
        return (
            f"no token may be chosen {where}, because of {names}; expected at least one: allow more tokens, or forbid "
            "fewer"
        )

    def active(self, output: Sequence[int]) -> bool:
        """Return whether a logit may change for the token behind `output`, the tokens of the answer so far."""
        return (
            self._grammar is not None
            or self._allowed is not None
            or len(self._bias_ids) > 0
            or self._counts is not None
            or any(len(ids) > 0 for ids in self._forbidden(output))
        )

    def apply(self, logits: FloatArray, output: Sequence[int]) -> FloatArray:
        """Return the changed logits.

        Args:
            logits: (V,) finite logits; they are not written to.
            output: Tokens of the answer so far.

        Returns:
            (V,) in an array that the thread's next call overwrites: finite, or -inf where a token is forbidden.

        Raises:
            RequestError: Every token is forbidden.
        """
        changed = thread_scratch(self._vocab_size).logits[: self._vocab_size]
        np.copyto(changed, logits)
        changed[self._bias_ids] += self._bias
        if self._counts is not None:
            self._counts.synchronise(output)
            self._penalise(changed, self._counts)
        if self._allowed is not None:
            kept = changed[self._allowed]
            changed.fill(-np.inf)
            changed[self._allowed] = kept
        for ids in self._forbidden(output):
            changed[ids] = -np.inf
        if self._grammar is not None and (mask := self._grammar.mask(output)) is not None:
            np.putmask(changed, ~mask, -np.inf)
        if changed.max() == -np.inf:
            raise RequestError(self._nothing_left(f"behind the first {len(output)} tokens of the answer"))
        return changed

    def _penalise(self, logits: FloatArray, counts: TokenCounts) -> None:
        """Apply the penalties in place, in float64 for the few tokens that they change."""
        if self._repetition != 1:
            seen = counts.seen
            values = logits[seen].astype(np.float64)
            factor = np.where(values > 0, 1 / self._repetition, self._repetition)
            logits[seen] = np.clip(values * factor, -_LIMIT, _LIMIT)
        if self._frequency or self._presence:
            penalties = self._frequency * counts.counts + self._presence
            logits[counts.answered] = np.clip(logits[counts.answered] - penalties, -_LIMIT, _LIMIT)

    def _forbidden(self, output: Sequence[int]) -> list[IdArray]:
        """Return the tokens that must not follow `output`, as a few arrays."""
        found = [self._bad_tokens]
        if len(output) < self._min_tokens:
            found.append(self._ends)
        if self._bad_endings and output:
            endings = self._bad_endings.get(int(output[-1]), ())
            last = [token for prefix, token in endings if list(output[-len(prefix) :]) == prefix]
            found.append(np.array(last, dtype=np.intp))
        return found


def _ids(tokens: Collection[int], vocab_size: int) -> NDArray[np.intp]:
    """Return the distinct ids within the vocabulary, ascending."""
    return np.array(sorted({int(token) for token in tokens if 0 <= token < vocab_size}), dtype=np.intp)
