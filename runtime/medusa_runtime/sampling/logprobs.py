"""Log-probabilities of chosen and most likely tokens: the model's own, before temperature and processors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from medusa_runtime.results import Logprob, TokenLogprobs
from medusa_runtime.sampling.noise import weights
from medusa_runtime.sampling.ranking import top_ids
from medusa_runtime.sampling.scratch import thread_scratch
from medusa_runtime.sampling.summaries import certain_entries, in_order

if TYPE_CHECKING:
    from medusa_runtime.backends.base import RowSummary
    from medusa_runtime.rows import RowReader


def token_logprobs(rows: RowReader, row: int, token: int, count: int) -> TokenLogprobs:
    """Return the log-probability of a token and the `count` most likely tokens with theirs.

    Args:
        rows: Reads logits; only the summary of the row is read where it has the token and enough others.
        row: Where the logits are that the token was chosen from.
        token: The chosen token.
        count: Number of most likely tokens; all if the vocabulary is smaller. Equal ones are in order of their ids.

    Raises:
        InvalidLogitsError: A logit of the row is not finite.
    """
    summary = rows.summary(row)
    if summary is not None and summary.finite:
        found = _from_summary(summary, token, count)
        if found is not None:
            return found
    logits = rows(row)
    largest = float(logits.max())
    masses = weights(logits, 1.0, largest, thread_scratch(len(logits)).weights[: len(logits)])
    normaliser = largest + math.log(float(masses.sum(dtype=np.float64)))
    top = top_ids(logits, min(count, len(logits)))
    return TokenLogprobs(
        token,
        float(logits[token]) - normaliser,
        tuple(Logprob(int(one), float(logits[one]) - normaliser) for one in top),
    )


def _from_summary(summary: RowSummary, token: int, count: int) -> TokenLogprobs | None:
    """Return the log-probabilities, or None if the summary lacks the token or leaves the most likely ones open."""
    summary = in_order(summary)
    place = np.flatnonzero(summary.ids == token)
    if len(place) == 0 or count > certain_entries(summary):
        return None
    values = summary.logits.astype(np.float64) - summary.logsumexp
    top = zip(summary.ids[:count].tolist(), values[:count].tolist(), strict=True)
    return TokenLogprobs(token, float(values[place[0]]), tuple(Logprob(one, value) for one, value in top))
