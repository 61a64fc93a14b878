"""Chooses the next token of one answer: processors, filters, and the most likely token or a draw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medusa_runtime.sampling.filters import Filters, Nucleus
from medusa_runtime.sampling.noise import DrawKey, draw, draw_key
from medusa_runtime.sampling.processors import Processors
from medusa_runtime.sampling.summaries import certain_entries, in_order, kept_of_summary
from medusa_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from medusa_runtime.backends.base import FloatArray, RowSummary
    from medusa_runtime.rows import RowReader
    from medusa_runtime.structured.answer_grammar import AnswerGrammar


class Sampler:
    """Chooses the tokens of one answer.

    A choice depends on the parameters, the seed, the answer's index, the tokens before, and the logits: not on what was
    chosen or rejected elsewhere in a tree, nor on earlier calls. So calls may be repeated, and tokens of every path may
    be asked for in any order.

    Args:
        params: Parameters of the request.
        prompt_ids: Tokens of the prompt.
        vocab_size: V.
        end_ids: Tokens that `min_tokens` forbids: the model's end tokens and the request's stop tokens.
        bad_word_ids: Token sequences of `bad_words`, as `sampling.bad_word_ids` returns them.
        seed: Seed of the request, from 0 to 2**64 - 1.
        choice: Index of the answer among the request's.
        grammar: Follows the answer through what it has to match; None if it may be anything.

    Raises:
        ArgumentError: The parameters forbid every token, or one of them is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        end_ids: Collection[int],
        bad_word_ids: Sequence[Sequence[int]],
        seed: int,
        choice: int,
        grammar: AnswerGrammar | None = None,
    ) -> None:
        params.check_vocabulary(vocab_size)
        self._vocab_size, self._seed, self._choice = vocab_size, seed, choice
        self._processors = Processors(params, prompt_ids, vocab_size, end_ids, bad_word_ids, grammar)
        self._filters = None if params.is_greedy else Filters.of(params)

    def choose(self, rows: RowReader, row: int, output: Sequence[int]) -> int:
        """Return the token that follows `output`.

        Args:
            rows: Reads logits; only `row` is read, and only its summary where that suffices.
            row: Where the logits behind the last token of `output` are.
            output: All tokens of the answer before this one; its length is the position that the draw depends on.

        Raises:
            InvalidLogitsError: A logit of the row is not finite.
            RequestError: The processors forbid every token.
        """
        if self._processors.active(output):
            return self._from_row(self._processors.apply(rows(row), output), len(output))
        summary = rows.summary(row)
        if summary is not None and summary.finite:
            token = self._from_summary(summary, len(output))
            if token is not None:
                return token
        return self._from_row(rows(row), len(output))

    def _from_row(self, logits: FloatArray, position: int) -> int:
        if self._filters is None:
            return int(logits.argmax())
        return draw_filtered(logits, self._filters, draw_key(self._seed, self._choice, position))

    def _from_summary(self, summary: RowSummary, position: int) -> int | None:
        """Return the token that the whole row would give, or None if the summary does not determine it."""
        if self._filters is not None and not self._filters.active:
            return None
        summary = in_order(summary)
        if self._filters is None:
            return int(summary.ids[0]) if certain_entries(summary) else None
        counts = kept_of_summary(self._filters, summary, self._vocab_size)
        if counts is None:
            return None
        fewest, most = counts
        order = np.argsort(summary.ids[:most])  # ascending, as in a row
        ids, logits = summary.ids[:most][order].astype(np.intp), summary.logits[:most][order]
        token = draw(logits, ids, self._filters.temperature, draw_key(self._seed, self._choice, position))
        return token if fewest == most or token in summary.ids[:fewest] else None


def draw_filtered(logits: FloatArray, filters: Filters, key: DrawKey) -> int:
    """Draw a token id from those that the filters keep.

    If a token that is drawn from more tokens is among the kept ones, then it is what a draw from these alone gives,
    since it has the best score of all. So a large nucleus is rarely ranked.

    Args:
        logits: (V,) logits after the processors; at least one must be above -inf.
        filters: The filters.
        key: The key of this draw.
    """
    ids = filters.left(logits)
    left = logits if ids is None else logits[ids]
    if filters.top_p < 1:
        nucleus = Nucleus(left, filters)
        if nucleus.is_large:
            token = draw(left, ids, filters.temperature, key)
            if nucleus.surely_has(token if ids is None else int(np.searchsorted(ids, token))):
                return token
        inside = nucleus.indices()
        ids, left = inside if ids is None else ids[inside], left[inside]
    return draw(left, ids, filters.temperature, key)
