"""Requests over the toy model: every answer is that of plain decoding, token for token, and ends where that ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from medusa_profiles import ProfileError, TreeProfile
from medusa_runtime.accept import Typical
from medusa_runtime.errors import (
    ArgumentError,
    MedusaError,
)
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import EOS, VOCAB, FakeBackend, logits_of, plain_answer, random_tree, state_of
from .toy_engine import plain_tokens, random_ids, random_params, text_of, toy_engine

SECONDS = 20  # that nothing here may take
PROMPT = [6, 6]
GREEDY = SamplingParams(max_tokens=20)


@pytest.fixture
def engine() -> Any:
    made = toy_engine()
    yield made
    made.close(drain=False, timeout=SECONDS)


def whole(handle: Any) -> tuple[str, list[int]]:
    """Text and tokens of the chunks of a request with one answer."""
    chunks = list(handle)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is not None
    assert all(chunk.token_ids for chunk in chunks)
    return "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_answers_with_any_tree_are_those_of_plain_decoding(seed: int, summaries: bool) -> None:
    rng = np.random.default_rng(seed)
    backend = FakeBackend(hit_rate=0.7, spread=3, summaries=summaries)
    with toy_engine(backend, random_tree(rng, int(rng.integers(1, 14)))) as engine:
        for _ in range(12):
            prompt, params = random_ids(rng), random_params(rng)
            handle = engine.submit(prompt, params)
            expected, reason = plain_tokens(prompt, params)
            text, tokens = whole(handle)
            result = handle.result()
            assert (tokens, result.finish_reason) == (expected, reason)
            shown = expected[:-1] if reason == "stop" else expected
            assert text == result.text == text_of(shown)
            assert result.token_ids == tuple(expected) and result.prompt_token_ids == tuple(prompt)
            stopped_by = expected[-1] if reason == "stop" and (expected[-1] != EOS or params.ignore_eos) else None
            assert result.stop_reason == stopped_by


def test_a_request_without_parameters_is_greedy_and_has_256_tokens_at_most(engine: Any) -> None:
    result = engine.generate([1])
    tokens, reason = plain_answer([1], 256, (EOS,), 4096)
    assert (list(result.token_ids), result.finish_reason) == (tokens, reason)
    assert result.acceptance == "lossless" and result.profile == "chain"


def test_a_request_without_a_limit_fills_the_context() -> None:
    with toy_engine(FakeBackend(context=48)) as engine:
        result = engine.generate([1, 2], SamplingParams(max_tokens=None, ignore_eos=True))
        assert list(result.token_ids) == plain_answer([1, 2], 1000, (), 48)[0]
        assert len(result.token_ids) == 46 and result.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_several_answers_are_each_their_own(engine: Any, temperature: float, count: int) -> None:
    params = SamplingParams(max_tokens=15, temperature=temperature, seed=3, n=count)
    handle = engine.submit([4, 5, 6], params)
    pieces = [""] * count
    for chunk in handle:
        pieces[chunk.index] += chunk.text
    result = handle.result()
    assert [choice.index for choice in result.choices] == list(range(count))
    for choice in result.choices:
        assert list(choice.token_ids) == plain_tokens([4, 5, 6], params, choice=choice.index)[0]
        assert choice.text == pieces[choice.index]
    assert (len({choice.token_ids for choice in result.choices}) > 1) == (count > 1)
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)
    assert result.usage.prompt_tokens == 3
    assert result.usage.total_tokens == 3 + result.usage.completion_tokens


def test_the_seed_that_was_drawn_gives_the_answer_again(engine: Any) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.5)
    first, second = engine.generate(PROMPT, params), engine.generate(PROMPT, params)
    assert first.seed != second.seed and first.token_ids != second.token_ids
    again = engine.generate(PROMPT, SamplingParams(max_tokens=40, temperature=1.5, seed=first.seed))
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_end_an_answer_where_they_end_plain_decoding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with toy_engine(profile=random_tree(rng, 10)) as engine:
        for _ in range(15):
            prompt = random_ids(rng)
            base: dict[str, Any] = {"max_tokens": 50, "temperature": float(rng.choice([0, 1.0])), "seed": 1}
            tokens, reason = plain_tokens(prompt, SamplingParams(**base))
            text = text_of(tokens)
            starts = rng.integers(len(text), size=2) if text else []
            stops = [text[at : at + int(rng.integers(1, 4))] for at in starts] + ["zz"]
            keep = bool(rng.random() < 0.5)
            handle = engine.submit(
                prompt, SamplingParams(**base, stop=stops, include_stop_str_in_output=keep, logprobs=0)
            )
            streamed, streamed_tokens = whole(handle)
            result = handle.result()
            ends = [(text.index(stop) + len(stop), stops.index(stop), stop) for stop in stops if stop in text]
            if ends:
                end, _, stop = min(ends)
                assert (result.finish_reason, result.stop_reason) == ("stop", stop)
                assert result.text == text[: end if keep else end - len(stop)]
                assert list(result.token_ids) == tokens[:end]  # a token is a character
            else:
                assert (list(result.token_ids), result.finish_reason) == (tokens, reason)
            assert (streamed, tuple(streamed_tokens)) == (result.text, result.token_ids)
            assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)


@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_logprobs_are_the_models_own_at_every_kept_token(count: int, summaries: bool) -> None:
    rng = np.random.default_rng(count)
    with toy_engine(FakeBackend(hit_rate=0.8, spread=2, summaries=summaries), random_tree(rng, 8)) as engine:
        for temperature, penalty in ((0, 1.0), (1.3, 1.0), (0.8, 1.4)):
            prompt = random_ids(rng)
            params = SamplingParams(
                max_tokens=30, temperature=temperature, seed=5, repetition_penalty=penalty, logprobs=count
            )
            handle = engine.submit(prompt, params)
            chunks = list(handle)
            result = handle.result()
            assert result.logprobs == tuple(one for chunk in chunks for one in chunk.logprobs or ())
            assert len(result.logprobs) == len(result.token_ids)
            tokens = list(prompt)
            for token, found in zip(result.token_ids, result.logprobs, strict=True):
                row = logits_of(state_of(tokens)).astype(np.float64)
                expected = row - np.log(np.exp(row).sum())
                assert found.token_id == token and found.logprob == pytest.approx(expected[token], abs=1e-5)
                order = np.argsort(-row, kind="stable")[:count]
                assert [one.token_id for one in found.top] == order.tolist()
                assert [one.logprob for one in found.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
                tokens.append(token)
    assert SamplingParams().logprobs is None


def test_without_logprobs_there_are_none(engine: Any) -> None:
    handle = engine.submit(PROMPT, GREEDY)
    assert all(chunk.logprobs is None for chunk in handle)
    assert handle.result().logprobs is None


def test_the_tree_of_a_request_is_its_own(engine: Any) -> None:
    tree = random_tree(np.random.default_rng(2), 9)
    for profile, name in ((None, "chain"), ("chain", "chain"), ("plain", "plain"), (tree, "random")):
        result = engine.generate(PROMPT, SamplingParams(max_tokens=20, profile=profile))
        assert result.profile == name
        assert list(result.token_ids) == plain_answer(PROMPT, 20, (EOS,), 4096)[0]
        assert (result.steps == len(result.token_ids) - 1) or name != "plain"
    with pytest.raises(ProfileError, match="depth 6"):
        engine.submit(PROMPT, SamplingParams(profile=TreeProfile("deep", tuple((0,) * depth for depth in range(1, 7)))))


def test_typical_acceptance_is_labelled_and_takes_its_own_thresholds(engine: Any) -> None:
    exact = engine.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True))
    lossy = engine.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, acceptance="typical"))
    free = engine.generate(
        PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, acceptance=Typical(0.0, 0.0, temperature=2.0))
    )
    assert (exact.acceptance, lossy.acceptance, free.acceptance) == ("lossless", "typical", "typical")
    assert free.steps < min(lossy.steps, exact.steps)  # thresholds of 0 accept every candidate


def test_steps_and_acceptance_by_depth_add_up(engine: Any) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, n=2, temperature=0.5, seed=1)
    results = [engine.generate(PROMPT, params) for _ in range(3)]
    choices = [choice for result in results for choice in result.choices]
    for choice in choices:
        assert 0 <= 1 + choice.steps + sum(choice.accepted_by_depth) - len(choice.token_ids) <= 1  # the end of a path
        assert all(a <= d for a, d in zip(choice.accepted_by_depth, choice.drafted_by_depth, strict=True))
        assert list(choice.accepted_by_depth) == sorted(choice.accepted_by_depth, reverse=True)
        assert choice.drafted_by_depth[0] <= choice.steps and choice.decode_seconds > 0
    for result in results:
        times = result.times
        assert result.accepted_by_depth == result.choices[0].accepted_by_depth
        assert result.drafted_by_depth == result.choices[0].drafted_by_depth
        assert times.queue >= 0 and times.prefill > 0 and times.decode > 0
        assert times.queue + times.prefill + times.decode <= times.total
    stats = engine.stats()
    assert stats.finished == 3 and stats.cancelled == stats.failed == stats.waiting == stats.running == 0
    assert stats.prompt_tokens == 6  # each prompt is computed once for its two answers
    assert stats.completion_tokens == sum(len(choice.token_ids) for choice in choices)
    assert stats.steps == sum(choice.steps for choice in choices)
    depths = [sum(choice.accepted_by_depth[d] for choice in choices) for d in range(3)]
    assert list(stats.accepted_by_depth) == depths and stats.accepted_tokens == sum(depths)
    assert stats.drafts >= stats.drafted_by_depth[0] and stats.draft_tokens == 3 * stats.drafts
    assert 0 < stats.kv_rows <= stats.kv_capacity
    assert stats.step_tokens == stats.completion_tokens - len(choices)
    assert stats.tokens_per_step == pytest.approx(stats.step_tokens / stats.steps)


def test_an_unknown_tree_is_refused_with_those_that_there_are(engine: Any) -> None:
    for name in ("zz", "z" * 10**6):
        with pytest.raises(
            ArgumentError, match=r"^profile is 'z.*expected one of the bundle's trees, chain, plain"
        ) as found:
            engine.submit(PROMPT, SamplingParams(profile=name))
        assert "toy-bundle" not in str(found.value) and len(str(found.value)) < 300


def test_an_engine_says_what_it_runs(engine: Any) -> None:
    assert repr(engine) == "<Engine toy-bundle, fake, exact, chain>"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"params": 3}, "params is 3, of type int; expected SamplingParams"),
    "a long number": ({"params": 10**5000}, "params is a value too long to show, of type int; expected SamplingParams"),
    "a long time": ({"timeout": 10**5000}, "timeout is a value too long to show; expected a finite number of seconds"),
    "no time": ({"timeout": 0}, "timeout is 0; expected a finite number of seconds"),
    "endless": ({"timeout": math.inf}, "timeout is inf"),
    "a text": ({"timeout": "1"}, "timeout is '1'"),
    "a token": ({"params": SamplingParams(stop_token_ids=[VOCAB])}, f"stop_token_ids has the token id {VOCAB}"),
    "nothing left": ({"params": SamplingParams(allowed_token_ids=[EOS], min_tokens=2)}, "no token may be chosen"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_the_queue(engine: Any, case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ArgumentError, match=message):
        engine.submit(PROMPT, **arguments)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.failed) == (0, 0, 0)


@pytest.mark.parametrize("option", ["max_tokens", "stream", "max_new_tokens"])
def test_options_of_another_place_are_named(engine: Any, option: str) -> None:
    with pytest.raises(ArgumentError, match=f"unknown option '{option}'; expected some of raw, .*SamplingParams"):
        engine.generate(PROMPT, **{option: 3})


def test_an_error_that_is_read_again_does_not_grow(engine: Any) -> None:
    handle = engine.submit(PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True))
    handle.cancel()
    lengths = []
    for _ in range(5):
        with pytest.raises(MedusaError) as found:
            handle.result(SECONDS)
        lengths.append(len(found.traceback))
    assert len(set(lengths)) == 1
    assert repr(handle) == f"<RequestHandle {handle.number}, done>"
    for wrong in (-1, math.nan, "1", True):
        with pytest.raises(ArgumentError, match="timeout is"):
            handle.result(wrong)
