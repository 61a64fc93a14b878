"""Requests with every kind of draft give the tokens of plain decoding, and it is counted what their steps verified."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.drafting.step_times import Kind
from medusa_runtime.errors import ArgumentError
from medusa_runtime.sampling_params import DRAFTS, SamplingParams
from medusa_runtime.stats import MAX_NAMES

from .decoding import CHAIN
from .fake_backend import FakeBackend, plain_answer
from .toy_engine import plain_tokens, random_ids, random_params, toy_engine

PROMPT = [6, 6]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("summaries", [False, True])
def test_every_draft_gives_the_answers_of_plain_decoding(draft: str, summaries: bool) -> None:
    rng = np.random.default_rng(5)
    with toy_engine(FakeBackend(hit_rate=0.7, spread=2, summaries=summaries), is_tree_fixed=False) as engine:
        for _ in range(60):
            params, prompt = random_params(rng, draft=draft), random_ids(rng) * int(rng.integers(1, 4))
            result = engine.generate(prompt, params)
            assert list(result.token_ids) == plain_tokens(prompt, params)[0]
        stats = engine.stats()
    assert sum(stats.steps_by_draft.values()) == stats.steps
    assert sum(count for name, count in stats.steps_by_draft.items() if name != "plain") == stats.drafts


def test_a_tree_that_was_chosen_is_verified_in_every_step() -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with toy_engine() as engine:  # the tree was chosen when the engine was loaded
        engine.generate(PROMPT, params)
        assert set(engine.stats().steps_by_draft) == {"chain"}
    with toy_engine(is_tree_fixed=False) as engine:
        engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, profile=CHAIN))
        assert set(engine.stats().steps_by_draft) == {"chain"}
        engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, profile="plain"))
        assert set(engine.stats().steps_by_draft) == {"chain", "plain"}
        engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True, draft="ngram"))
        assert "ngram" in str(engine.stats().steps_by_draft)


def test_an_engine_without_heads_drafts_from_the_text() -> None:
    backend = FakeBackend()
    with toy_engine(backend, profile=TreeProfile.plain(), is_tree_fixed=False) as engine:
        result = engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
        assert list(result.token_ids) == plain_answer(PROMPT, 400, (), 4096)[0]
        assert "ngram" in str(engine.stats().steps_by_draft)
    assert not any(step.draft for step in backend.steps)


@pytest.mark.parametrize("draft", ["fast", "", 1, True, ["auto"]])
def test_other_drafts_are_refused(draft: Any) -> None:
    with pytest.raises(ArgumentError, match=r"draft is .*; expected one of auto, heads, ngram, or None"):
        SamplingParams(draft=draft)


def test_typical_acceptance_verifies_the_same_tree_in_every_step() -> None:
    """What it accepts depends on the candidates, and which drafts are the fastest depends on the machine."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, acceptance="typical")
    with toy_engine(is_tree_fixed=False) as engine:
        results = [engine.generate([*PROMPT * 8], params) for _ in range(3)]
        assert set(engine.stats().steps_by_draft) <= {CHAIN.name, "plain"}
    assert len({result.token_ids for result in results}) == 1 and results[0].profile == CHAIN.name


def test_warming_up_runs_every_draft_that_may_be_chosen() -> None:
    backend = FakeBackend()
    ran: set[tuple[int, bool]] = set()
    with toy_engine(backend, is_tree_fixed=False) as engine:
        backend.run = lambda step: ran.add((step.input_ids.shape[1], step.draft))  # type: ignore[method-assign]
        engine.warm_up()
    assert ran >= {(1, False), (4, True), *((count + 1, False) for count in backend.literal_counts)}


def test_the_controller_learns_from_the_time_of_the_backend() -> None:
    backend = FakeBackend()
    backend.run_seconds = 0.25
    with toy_engine(backend, is_tree_fixed=False) as engine:
        engine.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True))
        assert engine._experience.times.ms(Kind(CHAIN.size, heads=True)) == pytest.approx(250)


def test_literals_do_not_exceed_what_is_left_of_the_answer() -> None:
    with toy_engine(is_tree_fixed=False) as engine:
        for most in (2, 3, 4):
            result = engine.generate([3, 4, 5] * 20, SamplingParams(max_tokens=most, ignore_eos=True, draft="ngram"))
            assert len(result.token_ids) == most


def test_names_of_trees_are_counted_up_to_a_limit() -> None:
    with toy_engine() as engine:
        for number in range(MAX_NAMES + 20):
            tree = TreeProfile(f"own-{number}", ((0,),))
            engine.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True, profile=tree))
        found = engine.stats().steps_by_draft
    assert len(found) == MAX_NAMES + 1 and found["others"] >= 20
