"""Text in, text out, on a tiny real bundle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from medusa_runtime import Engine, SamplingParams
from medusa_runtime.errors import ArgumentError, BundleError, CapacityError, PromptError


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, profile="tree-8", threads=1)


def short(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, **more)


def test_the_stream_is_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate("Hello there", short(30))
    handle = engine.submit("Hello there", short(30))
    pieces = [chunk.text for chunk in handle]
    assert "".join(pieces) == whole.text
    tokens = whole.token_ids[:-1] if whole.finish_reason == "stop" else whole.token_ids
    assert whole.text == engine.tokenizer.decode(tokens)
    assert len(pieces) > 1
    assert handle.result().token_ids == whole.token_ids
    assert whole.steps <= len(whole.token_ids) - 1
    assert whole.tokens_per_step >= 1


@pytest.mark.parametrize("temperature", [0, 0.7, 1.2])
def test_plain_and_tree_answer_alike(engine: Engine, temperature: float) -> None:
    for prompt in ("Hello there", "a b c", "日本 🎉"):
        answers = [
            engine.generate(
                prompt, short(40, temperature=temperature, seed=4, repetition_penalty=1.1, profile=profile)
            ).token_ids
            for profile in ("plain", "tree-8", "tree-16")
        ]
        assert answers[0] == answers[1] == answers[2]


def test_token_ids_are_a_prompt(engine: Engine) -> None:
    ids = engine.encode("Hello there")
    assert engine.generate(ids, short(20)).token_ids == engine.generate("Hello there", short(20)).token_ids
    assert list(engine.generate(ids, short(3)).prompt_token_ids) == ids


def test_messages_and_raw_text(engine: Engine) -> None:
    assert engine.encode("Hi") == engine.encode([{"role": "user", "content": "Hi"}])
    assert engine.encode("Hi", raw=True) == engine.tokenizer.encode("Hi", add_special_tokens=True)
    assert len(engine.encode("Hi")) > len(engine.encode("Hi", raw=True))
    with pytest.raises(PromptError, match="raw prompt must be one text"):
        engine.encode([{"role": "user", "content": "Hi"}], raw=True)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: str | list[dict[str, str]]) -> None:
    with pytest.raises(PromptError, match="empty"):
        engine.generate(prompt)


def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(CapacityError, match=rf"context of {engine.bundle.model.context} tokens"):
        engine.generate("word " * 4000)
    assert engine.generate("still well", short(3)).text


def test_a_sequence_may_be_held_to_fewer_tokens_than_the_context(tiny_bundle: Path) -> None:
    engine = Engine.load(tiny_bundle, profile="tree-8", threads=1, max_length=40)
    result = engine.generate("one", SamplingParams(max_tokens=None, ignore_eos=True))
    assert (result.finish_reason, result.usage.total_tokens) == ("length", 40)
    with pytest.raises(CapacityError, match="context of 40 tokens"):
        engine.generate("word " * 40)
    whole = Engine.load(tiny_bundle, threads=1, max_length=1 << 20)  # no more than the model has
    assert whole.context == engine.bundle.model.context
    with pytest.raises(ArgumentError, match="max_length is 0; expected at least 1"):
        Engine.load(tiny_bundle, max_length=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["Hi"], "message 0 is 'Hi', of type str; expected a mapping with texts for 'role' and 'content'"),
        ([["user", "Hi"]], "message 0 is .*of type list"),
        ([{"role": "user"}], "message 0 must have texts for 'role' and 'content'"),
        (None, "the prompt is None, of type NoneType; expected a text, or a list of messages"),
        (7, "the prompt is 7, of type int"),
        (b"Hi", "the prompt is b'Hi', of type bytes"),
        ({"role": "user", "content": "Hi"}, "of type dict; expected a text, or a list of messages"),
    ],
    ids=repr,
)
def test_a_prompt_of_another_type_is_refused_in_words(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        engine.generate(prompt)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": -2},
        {"threads": 1.5},
        {"threads": "2"},
        {"threads": True},
        {"max_length": "100"},
        {"max_length": 100.0},
        {"max_length": True},
        {"max_length": -1},
        {"gpu": -1},
        {"gpu": "cuda:0"},
        {"gpu": None},
        {"profile": 8},
        {"profile": ""},
        {"profile": ["tree-4"]},
        {"calibration": 3},
        {"backend": None},
        {"backend": ["ort-cpu"]},
        {"precision": 32},
        {"precision": ""},
        {"max_waiting": 0},
        {"max_waiting": None},
        {"prefix_cache_bytes": -1},
        {"prefix_cache_bytes": 1e9},
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_refused_in_words(tiny_bundle: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ArgumentError, match=rf"{name}.*; ?expected|{name}.*: expected"):
        Engine.load(tiny_bundle, **wrong)


def test_answers_of_many_threads_are_each_their_own(engine: Engine) -> None:
    cases = [(prompt, short(12, temperature=t, seed=3)) for prompt in ("Hello there", "a b c") for t in (0, 1)]
    expected = [engine.generate(*case).token_ids for case in cases]
    assert len(set(expected)) == len(cases)
    found: list[tuple[int, tuple[int, ...]]] = []

    def ask(which: int) -> None:
        for _ in range(15):
            found.append((which, engine.generate(*cases[which]).token_ids))

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15 * len(cases)
    assert all(tokens == expected[which] for which, tokens in found)


def test_the_bundle_names_the_tree_to_take_by_default(tiny_bundle: Path) -> None:
    engine = Engine.load(tiny_bundle, threads=1)
    assert engine.profile.name == engine.bundle.graph("ort-cpu")[0].profile != "plain"


def test_unknown_names_are_refused_with_what_there_is(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no profile 'tree-9'.*tree-8"):
        Engine.load(tiny_bundle, profile="tree-9")
    engine = Engine.load(tiny_bundle, threads=1)
    with pytest.raises(ArgumentError, match=r"profile is 'tree-9'; .*tree-8") as found:
        engine.submit("Hi", SamplingParams(profile="tree-9"))
    assert str(tiny_bundle) not in str(found.value)
    assert repr(engine) == f"<Engine {tiny_bundle.name}, ort-cpu, fp32, {engine.profile.name}>"


def test_the_lossy_rule_is_chosen_by_name(engine: Engine) -> None:
    result = engine.generate("Hello there", short(30, acceptance="typical"))
    assert 1 <= len(result.token_ids) <= 30
    assert result.acceptance == "typical"
