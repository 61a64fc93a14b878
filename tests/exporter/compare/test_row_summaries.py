"""Summaries spelt out in numpy, and every way in which a summary can be wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from medusa_exporter.compare.row_summaries import exact_summary, summary_error

ROWS = np.random.default_rng(3).normal(size=(2, 300)).astype(np.float32)


@pytest.mark.parametrize("V", [1, 5, 64, 65, 1000])
def test_a_summary_is_a_stable_sort_and_a_sum(V: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        row = (rng.integers(0, 6, V) if seed % 2 else rng.normal(size=V)).astype(np.float32)
        found = exact_summary(row)
        ids = np.argsort(-row, kind="stable")[:64]
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_array_equal(found.logits, row[ids])
        assert found.ids.dtype == np.int32 and found.finite
        assert found.logsumexp == pytest.approx(np.log(np.exp(row.astype(float)).sum()), abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite(value: float) -> None:
    row = ROWS[0].copy()
    row[7] = value
    summary = exact_summary(row)
    assert not summary.finite and math.isnan(summary.logsumexp)
    assert summary_error(row[None], [exact_summary(ROWS[0])]) == math.inf
    assert summary_error(row[None], [exact_summary(ROWS[1])._replace(finite=False)]) == 0.0  # the rest is unspecified


@pytest.mark.parametrize(
    "change",
    [
        {"finite": False},
        {"ids": "swapped"},
        {"ids": "moved"},
        {"ids": "beyond"},
        {"ids": "negative"},
        {"ids": "few"},
        {"logits": "rounded"},
        {"ids": "one twice", "logits": "one twice too"},
        {"ids": "second best", "logits": "of the second best"},
        {"ids": "reversed", "logits": "ascending"},
        {"logsumexp": math.nan},
        {"logsumexp": math.inf},
    ],
)
def test_what_is_wrong_is_infinitely_wrong(change: dict[str, Any]) -> None:
    summaries = [exact_summary(row) for row in ROWS]
    assert summary_error(ROWS, summaries) == 0.0
    wrong, ranked = summaries[1], np.argsort(-ROWS[1])
    values = {
        "swapped": np.r_[wrong.ids[1], wrong.ids[0], wrong.ids[2:]],
        "moved": np.roll(wrong.ids, 1),
        "beyond": np.r_[wrong.ids[:-1], 300],
        "negative": wrong.ids - 300,  # numpy would count these from the end
        "few": wrong.ids[:-1],
        "rounded": wrong.logits.astype(np.float16).astype(np.float32),
        "one twice": np.r_[wrong.ids[0], wrong.ids[:-1]],
        "one twice too": np.r_[wrong.logits[0], wrong.logits[:-1]],
        "second best": ranked[1:65],
        "of the second best": ROWS[1][ranked[1:65]],
        "reversed": wrong.ids[::-1],
        "ascending": wrong.logits[::-1],
    }
    summaries[1] = wrong._replace(**{name: values.get(value, value) for name, value in change.items()})
    assert summary_error(ROWS, summaries) == math.inf


def test_equal_logits_may_be_those_of_any_tokens_in_any_order() -> None:
    row = np.repeat(np.float32([3, 2, 1]), [5, 40, 255])
    expected = exact_summary(row)
    rng = np.random.default_rng(0)
    ids = np.r_[rng.permutation(5), 5 + rng.permutation(40), 45 + rng.permutation(255)][:64]
    assert summary_error(row[None], [expected._replace(ids=ids)]) == 0.0
    assert summary_error(row[None], [expected._replace(ids=np.r_[ids[:-1], ids[-2]])]) == math.inf  # one of them twice
    assert summary_error(row[None], [expected._replace(ids=np.r_[299, ids[1:]])]) == math.inf  # not of this logit


def test_a_flag_may_be_false_only_where_the_sum_of_the_row_may_overflow() -> None:
    for scale, error in ((1e34, math.inf), (1e37, 0.0)):
        row = (ROWS[0] * scale).astype(np.float32)
        summary = exact_summary(row)
        assert summary.finite and summary_error(row[None], [summary]) == 0.0
        assert summary_error(row[None], [summary._replace(finite=False)]) == error


def test_a_logsumexp_is_measured_by_its_magnitude() -> None:
    summary = exact_summary(ROWS[0] * 0 + 1000)
    moved = summary._replace(logsumexp=summary.logsumexp + 0.1)
    assert summary_error(ROWS[:1] * 0 + 1000, [moved]) == pytest.approx(1e-4, rel=0.01)
    assert summary_error(ROWS[:0], []) == 0.0
