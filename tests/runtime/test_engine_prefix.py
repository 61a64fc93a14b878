"""Engines reuse the rows of earlier requests, and nothing but times and `cached_tokens` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_runtime.engine import Engine
from medusa_runtime.errors import ArgumentError, RequestCancelledError
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import VOCAB, FakeBackend
from .toy_engine import plain_tokens, random_params, toy_engine

PROMPT = [6, 7, 8, 9] * 6
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("budget", [None, 3000, 0])
@pytest.mark.parametrize("seed", range(10))
def test_chats_with_any_parameters_have_the_answers_of_plain_decoding(seed: int, budget: int | None) -> None:
    rng = np.random.default_rng(seed)
    backend = FakeBackend(hit_rate=0.7, spread=3, summaries=bool(seed % 2))
    with toy_engine(backend, is_tree_fixed=bool(seed % 3), prefix_cache_bytes=budget) as engine:
        chats: list[list[int]] = [[] for _ in range(3)]
        cached = []
        for _ in range(20):
            chat = chats[rng.integers(len(chats))]
            chat += rng.integers(VOCAB - 1, size=rng.integers(1, 20)).tolist()
            params = random_params(rng)
            result = engine.generate(chat, params)
            assert (list(result.token_ids), result.finish_reason) == plain_tokens(chat, params)
            assert 0 <= result.cached_tokens < len(chat)
            assert result.usage.cached_tokens == result.cached_tokens
            assert result.usage.prompt_tokens == len(chat)
            cached.append(result.cached_tokens)
            chat += result.token_ids
        stats = engine.stats()
    assert stats.reused_tokens == sum(cached) <= stats.prompt_tokens
    assert bool(stats.reused_tokens) is (budget != 0)


def test_requests_for_several_answers_count_their_prompt_once() -> None:
    with toy_engine() as engine:
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, n=3, seed=4)
        first, second = engine.generate(PROMPT, params), engine.generate(PROMPT, params)
        stats = engine.stats()
    assert [choice.token_ids for choice in first.choices] == [choice.token_ids for choice in second.choices]
    assert (first.cached_tokens, second.cached_tokens) == (0, len(PROMPT) - 1)
    assert (stats.prompt_tokens, stats.reused_tokens) == (2 * len(PROMPT), len(PROMPT) - 1)


def test_a_cancelled_request_leaves_its_rows_to_the_next() -> None:
    with toy_engine() as engine:
        handle = engine.submit(PROMPT, SamplingParams(max_tokens=2000, ignore_eos=True))
        tokens = list(next(handle).token_ids)
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            handle.result()
        result = engine.generate([*PROMPT, *tokens, 3], SHORT)
        assert result.cached_tokens >= len(PROMPT)
        assert (list(result.token_ids), "length") == plain_tokens([*PROMPT, *tokens, 3], SHORT)


def test_without_a_budget_every_prompt_is_computed() -> None:
    backend = FakeBackend()
    with toy_engine(backend, prefix_cache_bytes=0) as engine:
        for _ in range(2):
            assert engine.generate(PROMPT, SHORT).cached_tokens == 0
        assert engine.stats().reused_tokens == 0
    assert sum(step.input_ids.shape[1] == len(PROMPT) for step in backend.steps) == 2


@pytest.mark.parametrize("wrong", [-1, 1.5, "1 GB", True])
def test_another_budget_is_refused_before_the_bundle_is_opened(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="prefix_cache_bytes is"):
        Engine.load(tmp_path / "missing", prefix_cache_bytes=wrong)
    with pytest.raises(ArgumentError, match="prefix_cache_bytes is"):
        toy_engine(prefix_cache_bytes=wrong)


@pytest.mark.parametrize("profile", ["plain", "tree-8"])
def test_two_turns_on_a_real_graph_have_the_same_tokens_with_and_without(tiny_bundle: Path, profile: str) -> None:
    rng = np.random.default_rng(11)
    params = SamplingParams(max_tokens=24, ignore_eos=True)

    def second_answers(**settings: Any) -> list[tuple[int, ...]]:
        found, reused = [], 0
        with Engine.load(tiny_bundle, threads=1, profile=profile, **settings) as engine:
            first = [engine.generate(prompt, params) for prompt in prompts]
            for prompt, result in zip(prompts[::-1], first[::-1], strict=True):  # the last ones are stored
                found.append(result.token_ids)
                second = engine.generate([*prompt, *result.token_ids, *prompt[:9]], params)
                found.append(second.token_ids)
                reused += second.cached_tokens
        assert bool(reused) is (settings.get("prefix_cache_bytes") != 0)
        return found

    prompts = [rng.integers(10, 250, size=rng.integers(20, 120)).tolist() for _ in range(20)]
    assert second_answers() == second_answers(prefix_cache_bytes=0) == second_answers(prefix_cache_bytes=1_000_000)
