"""Filters against their definitions over a sorted list, and summaries against whole rows."""

import numpy as np
import pytest
from medusa_runtime.sampling.filters import LARGE, Filters
from medusa_runtime.sampling.noise import draw, draw_key
from medusa_runtime.sampling.ranking import kth_largest, top_ids
from medusa_runtime.sampling.sampler import draw_filtered
from medusa_runtime.sampling.summaries import certain_entries, in_order, kept_of_summary
from medusa_runtime.sampling_params import SamplingParams

from .reference import filtered
from .scripted import SUMMARY, summary_of

SIZES = (1, 2, 8, 64, 65, 300, 5000)


def random_row(rng, size):
    """A row of some shape: normal, with a few likely tokens, with many equal logits, or flat."""
    row = rng.normal(scale=rng.choice([0.0, 0.5, 2.0, 6.0]), size=size)
    if rng.random() < 0.5:
        row[rng.integers(0, size, 5)] += rng.uniform(3, 12)
    if rng.random() < 0.3:
        row = np.round(row)
    return row.astype(np.float32)


def random_filters(rng):
    return SamplingParams(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 1.3, 2.0])),
        min_p=float(rng.choice([0, 0, 0.01, 0.2, 1])),
        top_k=int(rng.choice([0, 0, 1, 5, 50, 64, 100])),
        top_p=float(rng.choice([1, 1, 0.95, 0.5, 0.999, 1e-9])),
    )


def kept(params, row):
    found = Filters.of(params).kept(row)
    return list(range(len(row))) if found is None else found.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_filters_keep_what_their_definitions_keep(size):
    for seed in range(150):
        rng = np.random.default_rng([size, seed])
        params, row = random_filters(rng), random_row(rng, size)
        if rng.random() < 0.3:
            row[rng.permutation(size)[: size // 2]] = -np.inf
        found = set(kept(params, row)) & set(np.flatnonzero(row > -np.inf).tolist())
        assert found == set(filtered(params, row.tolist())), (seed, params)


@pytest.mark.parametrize("size", [300, 5000, 2 * LARGE])
def test_a_draw_before_the_nucleus_is_ranked_is_the_draw_from_its_tokens(size):
    """A flat row has a large nucleus, which most draws do not rank; the border and equal logits are the hard cases."""
    for seed in range(60):
        rng = np.random.default_rng([size, seed])
        row = rng.normal(scale=rng.choice([0.0, 0.3, 1.0]), size=size)
        row = (np.round(4 * row) / 4 if seed % 3 == 0 else row).astype(np.float32)
        top_p, top_k = float(rng.choice([0.999, 0.9, 0.5, 0.1])), int(rng.choice([0, size // 4 * 3]))
        filters, key = Filters(1.3, top_p=top_p, top_k=top_k), draw_key(seed, 0, 0)
        ids = filters.kept(row)
        assert draw_filtered(row, filters, key) == draw(row[ids], ids, 1.3, key), (seed, filters)


@pytest.mark.parametrize("size", SIZES)
def test_a_summary_encloses_what_the_row_keeps_or_asks_for_it(size):
    decided = 0
    for seed in range(300):
        rng = np.random.default_rng([size, seed])
        params, row = random_filters(rng), random_row(rng, size)
        if not Filters.of(params).active:
            continue
        summary = in_order(summary_of(row, rng=rng))
        counts = kept_of_summary(Filters.of(params), summary, size)
        if counts is not None:
            decided += counts[0] == counts[1]
            smaller, larger = (set(summary.ids[:count].tolist()) for count in counts)
            assert smaller <= set(kept(params, row)) <= larger, (seed, params)
    assert decided > 60


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("entries", [1, 7, SUMMARY])
def test_the_certain_entries_of_an_ordered_summary_are_the_first_of_the_row(size, entries):
    for seed in range(60):
        rng = np.random.default_rng([size, seed])
        row = random_row(rng, size)
        row[row == 0] = rng.choice([0.0, -0.0], np.count_nonzero(row == 0))
        summary = summary_of(row, entries, rng)
        ordered = in_order(summary)
        certain = certain_entries(ordered)
        assert ordered.ids[:certain].tolist() == np.argsort(-row, kind="stable")[:certain].tolist()
        np.testing.assert_array_equal(ordered.logits, row[ordered.ids])
        assert sorted(ordered.ids) == sorted(summary.ids) and ordered.ids.dtype == np.int32
        assert certain == np.count_nonzero(row > ordered.logits[-1])
        assert ordered[2:] == summary[2:]


def test_a_summary_without_ties_is_not_copied():
    summary = summary_of(np.arange(100, dtype=np.float32))
    assert in_order(summary) is summary and certain_entries(summary) == SUMMARY - 1


def test_a_summary_decides_where_it_can():
    """A row of a trained model has most of its mass on few tokens; then no filter needs the row."""
    rng = np.random.default_rng(0)
    row = rng.normal(scale=1.5, size=5000).astype(np.float32)
    row[rng.permutation(5000)[:20]] += np.linspace(8, 14, 20, dtype=np.float32)
    for temperature in (0.5, 0.7, 1.0, 1.1):
        for given in ({"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}):
            filters = Filters.of(SamplingParams(temperature=temperature, **given))
            assert kept_of_summary(filters, summary_of(row), 5000) is not None, (temperature, given)
    assert kept_of_summary(Filters(1.0, top_p=0.99999999), summary_of(row), 5000) is None
    assert kept_of_summary(Filters(1.0, top_k=65), summary_of(row), 5000) is None
    assert kept_of_summary(Filters(1.0, min_p=1e-9), summary_of(row), 5000) is None


def test_equal_logits_at_the_border_of_top_k_are_all_kept_even_those_behind_the_summary():
    row = np.zeros(200, dtype=np.float32)
    row[:10] = 1
    assert kept(SamplingParams(temperature=1.0, top_k=20), row) == list(range(200))
    assert kept(SamplingParams(temperature=1.0, top_k=10), row) == list(range(10))
    assert kept_of_summary(Filters(1.0, top_k=20), summary_of(row), 200) is None
    assert kept_of_summary(Filters(1.0, top_k=10), summary_of(row), 200) == (10, 10)


def test_equal_logits_at_the_border_of_top_p_are_kept_by_their_ids():
    row = np.zeros(1000, dtype=np.float32)
    row[500] = 1
    assert kept(SamplingParams(temperature=1.0, top_p=0.25), row) == [*range(248), 500]
    assert kept(SamplingParams(temperature=1.0, top_p=1e-12), row) == [500]
    small = SamplingParams(temperature=1.0, top_p=0.02)
    assert len(kept(small, row)) == 19
    assert kept_of_summary(Filters.of(small), summary_of(row), 1000) is None  # they may be any of the equal ones
    row[10:300:10] = 0.5
    assert kept_of_summary(Filters.of(small), summary_of(row), 1000) == (12, 12)
    assert kept(small, row) == [*range(10, 120, 10), 500]


def test_the_mass_of_top_p_is_that_of_the_tokens_that_the_other_filters_left():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert kept(SamplingParams(temperature=1.0, top_p=0.65), row) == [0, 1]
    assert kept(SamplingParams(temperature=1.0, top_p=0.55, top_k=2), row) == [0]
    assert kept(SamplingParams(temperature=1.0, top_p=0.4, min_p=0.4), row) == [0]
    assert kept(SamplingParams(temperature=1.0, top_p=0.5, min_p=0.4), row) == [0, 1]


def test_bounds_of_the_mass_behind_a_summary_hold():
    """The decision at temperatures other than 1 rests on them."""
    from medusa_runtime.sampling.summaries import _tail

    for seed in range(200):
        rng = np.random.default_rng(seed)
        row = random_row(rng, 2000)
        temperature = float(rng.choice([0.2, 0.7, 0.99, 1.0, 1.01, 1.5, 4.0]))
        lower, upper = _tail(Filters(temperature), summary_of(row), 2000 - SUMMARY)
        behind = np.sort(row)[::-1][SUMMARY:].astype(np.float64)
        mass = np.exp((behind - float(row.max())) / temperature).sum()
        assert lower <= mass * (1 + 1e-9) + 1e-300 and mass <= upper * (1 + 1e-9), (seed, temperature)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 4999])
def test_the_largest_elements_are_found_without_sorting(size):
    for seed in range(30):
        rng = np.random.default_rng([size, seed])
        row = random_row(rng, size)
        ranked = np.argsort(-row, kind="stable")
        for k in {1, min(2, size), size // 3 or 1, size}:
            assert kth_largest(row, k) == row[ranked[k - 1]]
            assert top_ids(row, k).tolist() == ranked[:k].tolist()
    assert top_ids(np.zeros(3, np.float32), 0).tolist() == []
