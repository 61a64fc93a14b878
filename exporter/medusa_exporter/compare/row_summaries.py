"""Compares the summaries of rows with the rows that they summarise, spelt out in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from medusa_runtime.backends.base import FloatArray, RowSummary
from medusa_runtime.contract import summary_tokens

LARGEST_SUM = 0.999 * float(np.finfo(np.float32).max)  # of logits whose sum does not overflow in fp32, however rounded
SUMMARY_ERROR = 1e-4  # of a logsumexp, which sums in fp32; the other parts of a summary are exact


def exact_summary(logits: FloatArray) -> RowSummary:
    """Return the summary of one row (V,); in ids and logits, NaN counts as less than any other logit."""
    K = summary_tokens(len(logits))
    ordered = np.where(np.isnan(logits), -np.inf, logits)
    least = np.partition(ordered, len(logits) - K)[len(logits) - K]
    ids = np.flatnonzero(ordered >= least)  # ascending, so that a stable sort keeps the lower of equal logits first
    chosen = ids[np.argsort(-ordered[ids], kind="stable")[:K]].astype(np.int32)
    finite = bool(np.isfinite(logits).all())
    wide = logits.astype(np.float64)
    logsumexp = float(np.log(np.exp(wide - wide.max()).sum()) + wide.max()) if finite else math.nan
    return RowSummary(chosen, logits[chosen], logsumexp, finite)


def summary_error(logits: FloatArray, summaries: Sequence[RowSummary]) -> float:
    """Return how far summaries are from the rows that they summarise.

    Args:
        logits: (R, V), the rows.
        summaries: Of each row.

    Returns:
        The largest error of a logsumexp, as a share of its magnitude where that is above 1. inf if a flag is wrong, or
        if the tokens and logits are not exactly the most likely ones, where equal logits may be those of any tokens in
        any order. Of rows that are not finite only the flag is compared.
    """
    return max((_error(row, one) for row, one in zip(logits, summaries, strict=True)), default=0.0)


def _error(row: FloatArray, got: RowSummary) -> float:
    expected = exact_summary(row)
    if not got.finite:
        return 0.0 if not expected.finite or np.abs(row).sum(dtype=np.float64) > LARGEST_SUM else math.inf
    if not expected.finite:
        return math.inf
    ids = np.asarray(got.ids)
    valid = (
        ids.shape == expected.ids.shape and len(np.unique(ids)) == len(ids) and 0 <= ids.min() <= ids.max() < len(row)
    )
    if not valid or not np.array_equal(got.logits, expected.logits) or not np.array_equal(row[ids], got.logits):
        return math.inf
    if not math.isfinite(got.logsumexp):
        return math.inf
    return abs(got.logsumexp - expected.logsumexp) / max(1.0, abs(expected.logsumexp))
