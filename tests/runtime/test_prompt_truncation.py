"""What truncate_prompt_tokens keeps of a prompt, over the toy model."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
from medusa_runtime.errors import CapacityError, PromptError
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import VOCAB, FakeBackend
from .toy_engine import toy_engine


@pytest.mark.parametrize(
    ("keep", "expected"), [(None, list(range(9))), (3, [6, 7, 8]), (100, list(range(9))), (-1, list(range(9)))]
)
@pytest.mark.parametrize("max_tokens", [3, 10, 4000, None])
def test_prompts_are_truncated_from_the_left(keep: int | None, expected: list[int], max_tokens: int | None) -> None:
    with toy_engine(FakeBackend(context=16)) as engine:
        params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=keep)
        assert list(engine.generate(list(range(9)), params).prompt_token_ids) == expected


@pytest.mark.parametrize(
    ("length", "max_tokens", "kept"),
    [(15, 300, 15), (15, None, 15), (16, 2, 14), (16, 300, 12), (16, None, 12), (40, 3, 13), (40, 4, 12), (40, 5, 12)],
)
def test_a_prompt_that_does_not_fit_is_truncated_for_the_answer(length: int, max_tokens: int | None, kept: int) -> None:
    with toy_engine(FakeBackend(context=16)) as engine:
        params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=-1, ignore_eos=True)
        prompt = [at % 7 for at in range(length)]
        result = engine.generate(prompt, params)
        assert list(result.prompt_token_ids) == prompt[-kept:]
        assert len(result.token_ids) == min(max_tokens or 16, 16 - kept)


@pytest.mark.parametrize("context", [2, 3])
def test_the_shortest_contexts_keep_a_prompt_and_an_answer(context: int) -> None:
    with toy_engine(FakeBackend(context=context)) as engine:
        result = engine.generate([1] * 9, SamplingParams(truncate_prompt_tokens=-1))
        assert (len(result.prompt_token_ids), len(result.token_ids)) == (context - 1, 1)


def test_more_token_ids_than_the_context_has_are_truncated() -> None:
    ids = [1, 2] * 20
    with toy_engine(FakeBackend(context=16)) as engine:
        for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint8), collections.deque(ids)):
            for keep in (4, -1):
                result = engine.generate(prompt, SamplingParams(max_tokens=4, truncate_prompt_tokens=keep))
                assert list(result.prompt_token_ids) == ids[: 4 if keep == 4 else 12]


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        7,
        (token for token in (1, 2)),
        np.array(3),
        {1: 2},
        {1, 2},
        b"x",
        [],
        [True, 2],
        [VOCAB, 2],
        [-1, 2],
        ["x"],
    ],
    ids=lambda prompt: f"{type(prompt).__name__} {prompt!r:.20}",
)
def test_truncation_accepts_no_prompt_that_is_refused_without_it(prompt: Any) -> None:
    messages = []
    with toy_engine() as engine:
        for keep in (None, 1, -1):
            with pytest.raises(PromptError) as found:
                engine.submit(prompt, SamplingParams(truncate_prompt_tokens=keep))
            messages.append(str(found.value))
    assert len(set(messages)) == 1


def test_a_prompt_that_leaves_no_room_is_refused_at_once() -> None:
    with toy_engine(FakeBackend(context=16)) as engine:
        with pytest.raises(CapacityError, match=r"the prompt has 16 tokens, .*or set truncate_prompt_tokens"):
            engine.submit([1] * 16)
        with pytest.raises(CapacityError, match=r"the prompt has 20 tokens, .*or set a smaller truncate_prompt_tokens"):
            engine.submit([1] * 40, SamplingParams(truncate_prompt_tokens=20))
        assert engine.stats().failed == 0
