"""What the summary of a row determines: the order of its tokens, and how many of the first ones filters keep.

A summary has equal logits in any order, and `in_order` sorts them by their ids, as rules on whole rows do. It may have
any of the tokens whose logits equal the last entry's, so only the entries above that are certain (`certain_entries`).

Filters keep at least and at most so many of the first tokens. Where the two numbers are equal, the whole row would give
the same tokens; where they differ, a draw from the larger set that falls into the smaller one is the draw from every
set in between. What is not known is the mass of the tokens behind the summary at another temperature than 1, where its
logsumexp was taken. With x_i = exp(l_i - max l) of these n tokens, none of which is above the last x of the summary,
M = Σ x_i and q = 1 / T:

- q ≥ 1: n · (M / n)**q ≤ Σ x_i**q ≤ M · x**(q - 1), by convexity and as x_i ≤ x;
- q < 1: M · x**(q - 1) ≤ Σ x_i**q ≤ n · (M / n)**q, by the same two arguments with their signs changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from medusa_runtime.sampling.filters import Filters, nucleus_size

if TYPE_CHECKING:
    from medusa_runtime.backends.base import RowSummary

_MARGIN = 1e-4  # relative error of a mass: float32 logsumexp on a device, float32 weights on the host
_ROUNDING = 2.0**-21  # relative rounding of the logsumexp itself


def in_order(summary: RowSummary) -> RowSummary:
    """Return the summary with tokens of equal logits in ascending order of their ids."""
    logits = summary.logits
    if not (logits[1:] == logits[:-1]).any():
        return summary
    order = np.lexsort((summary.ids, -logits))
    return summary._replace(ids=summary.ids[order], logits=logits[order])


def certain_entries(summary: RowSummary) -> int:
    """Return how many of the first entries of an ordered summary are those of the row, in the same order.

    The logits of the others equal the last entry's, as may those of tokens that are not in the summary.
    """
    return int(np.count_nonzero(summary.logits > summary.logits[-1]))


def kept_of_summary(filters: Filters, summary: RowSummary, vocab_size: int) -> tuple[int, int] | None:
    """Return how many of the summary's first tokens, in order, the filters keep, at least and at most.

    None if they may keep a token that is not in the summary.

    Args:
        filters: The filters; at least one should be active, as otherwise all tokens are kept.
        summary: The summary of a row without processors; equal logits may be in any order.
        vocab_size: V.
    """
    ranked = summary.logits
    rest = vocab_size - len(ranked)
    least = filters.least_logit(float(ranked[0]))
    if 0 < filters.top_k <= len(ranked) and filters.top_k < vocab_size:
        least = max(least, float(ranked[filters.top_k - 1]))
    inside = int(np.count_nonzero(ranked >= least))
    if rest == 0 or inside < len(ranked):
        if filters.top_p == 1:
            return inside, inside
        masses = filters.masses(ranked[:inside])
        count = nucleus_size(masses, filters.top_p * float(masses[-1]))
        return count, count
    if filters.top_p == 1:
        return None
    masses = filters.masses(ranked)
    lower, upper = _tail(filters, summary, rest)
    if filters.min_p > 0 or filters.top_k > 0:
        lower = 0.0  # the tokens behind the summary may be left out before top_p
    fewest = filters.top_p * (float(masses[-1]) + lower) * (1 - _MARGIN)
    most = filters.top_p * (float(masses[-1]) + upper) * (1 + _MARGIN)
    if masses[-1] < most:
        return None
    larger = nucleus_size(masses, most)
    return (nucleus_size(masses, fewest), larger) if larger <= certain_entries(summary) else None


def _tail(filters: Filters, summary: RowSummary, rest: int) -> tuple[float, float]:
    """Return bounds of the mass behind the summary, relative to the most likely token's, at the filters' temperature.

    Args:
        filters: The filters.
        summary: The summary.
        rest: Number of tokens behind it, above 0.
    """
    largest, last = float(summary.logits[0]), float(summary.logits[-1]) - float(summary.logits[0])
    error = _MARGIN + _ROUNDING * abs(summary.logsumexp)
    total = math.exp(min(summary.logsumexp - largest, 700.0))
    inside = float(Filters(1.0).masses(summary.logits)[-1])
    most = rest * math.exp(last)
    low = min(max(0.0, total * (1 - error) - inside), most)
    high = min(max(0.0, total * (1 + error) - inside), most)
    exponent = 1 / filters.temperature
    if exponent >= 1:
        return rest * (low / rest) ** exponent, high * math.exp(last * (exponent - 1))
    lower = math.exp(math.log(low) + last * (exponent - 1)) if low > 0 else 0.0
    return lower, rest * (high / rest) ** exponent
