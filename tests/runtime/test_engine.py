"""Text in, text out, on a tiny real bundle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from medusa_runtime import BusyError, Engine, Generation, MedusaError
from medusa_runtime.errors import ArgumentError, BundleError, CapacityError, PromptError


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, profile="tree-8", threads=1)


def test_the_stream_is_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate("Hello there", max_new_tokens=30)
    stream = engine.generate("Hello there", stream=True, max_new_tokens=30)
    assert isinstance(stream, Generation)
    pieces = list(stream)
    assert "".join(pieces) == whole == engine.tokenizer.decode(stream.tokens)
    assert len(pieces) > 1
    assert stream.finish_reason in {"stop", "length"}
    assert stream.steps <= len(stream.tokens) - 1
    assert stream.tokens_per_step >= 1


def test_plain_and_tree_answer_alike(tiny_bundle: Path, engine: Engine) -> None:
    plain = Engine.load(tiny_bundle, profile="plain", threads=1)
    for prompt in ("Hello there", "a b c", "日本 🎉"):
        assert plain.generate(prompt, max_new_tokens=40) == engine.generate(prompt, max_new_tokens=40)


def test_messages_and_raw_text(engine: Engine) -> None:
    assert engine.encode("Hi") == engine.encode([{"role": "user", "content": "Hi"}])
    assert engine.encode("Hi", raw=True) == engine.tokenizer.encode("Hi", add_special_tokens=True)
    assert len(engine.encode("Hi")) > len(engine.encode("Hi", raw=True))
    with pytest.raises(PromptError, match="raw prompt must be one text"):
        engine.encode([{"role": "user", "content": "Hi"}], raw=True)


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: str | list[dict[str, str]]) -> None:
    with pytest.raises(PromptError, match="empty"):
        engine.generate(prompt)


def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(CapacityError, match=rf"context of {engine.bundle.model.context} tokens"):
        engine.generate("word " * 4000)
    assert engine.generate("still well", max_new_tokens=3)


def test_a_sequence_may_be_held_to_fewer_tokens_than_the_context(tiny_bundle: Path) -> None:
    engine = Engine.load(tiny_bundle, profile="tree-8", threads=1, max_length=40)
    prompt = engine.encode("one")
    engine.decoder.start(prompt, 100, stop_ids=())
    sequence = engine.decoder.sequence
    assert sequence is not None
    while sequence.finish_reason is None:
        engine.decoder.step()
    assert (sequence.finish_reason, len(prompt) + len(sequence.answer)) == ("length", 40)
    with pytest.raises(CapacityError, match="context of 40 tokens"):
        engine.generate("word " * 40)
    whole = Engine.load(tiny_bundle, threads=1, max_length=1 << 20)  # no more than the model has
    assert whole.decoder.cache.context == engine.bundle.model.context
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


@pytest.mark.parametrize("value", ["20", 2.5, None, True, 0])
def test_max_new_tokens_of_another_type_is_refused(engine: Engine, value: Any) -> None:
    with pytest.raises(PromptError, match="max_new_tokens is "):
        engine.generate("Hi", max_new_tokens=value)


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
        {"accept": ["greedy"]},
        {"accept": None},
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_refused_in_words(tiny_bundle: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ArgumentError, match=rf"{name}.*; ?expected|{name}.*: expected"):
        Engine.load(tiny_bundle, **wrong)


def test_answers_of_two_threads_are_right_or_refused(engine: Engine) -> None:
    """On a real backend: of 120 answers 8 were mixtures of two before."""
    prompts = ("Hello there", "a b c")
    expected = {prompt: engine.generate(prompt, max_new_tokens=12) for prompt in prompts}
    found: list[tuple[str, str | None]] = []

    def ask(prompt: str) -> None:
        for _ in range(30):
            try:
                found.append((prompt, engine.generate(prompt, max_new_tokens=12)))
            except BusyError:
                found.append((prompt, None))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in (*prompts, *prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [(prompt, text) for prompt, text in found if text is not None]
    assert len(found) == 120 and answers
    assert all(text == expected[prompt] for prompt, text in answers)
    assert engine.generate(prompts[0], max_new_tokens=12) == expected[prompts[0]]


def test_two_answers_at_once_are_refused_not_mixed(engine: Engine) -> None:
    first = engine.generate("one", stream=True, max_new_tokens=40)
    engine.generate("two", max_new_tokens=2)
    with pytest.raises(MedusaError, match="another prompt was started"):
        list(first)


def test_a_stream_may_be_left_and_taken_up_again(engine: Engine) -> None:
    stream = engine.generate("Hello there", stream=True, max_new_tokens=30)
    first = next(iter(stream))
    assert first + "".join(stream) == engine.generate("Hello there", max_new_tokens=30)


def test_the_bundle_names_the_tree_to_take_by_default(tiny_bundle: Path) -> None:
    engine = Engine.load(tiny_bundle, threads=1)
    assert engine.decoder.profile.name == engine.bundle.graph("ort-cpu")[0].profile != "plain"


def test_unknown_names_are_refused_with_what_there_is(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no profile 'tree-9'.*tree-8"):
        Engine.load(tiny_bundle, profile="tree-9")
    with pytest.raises(MedusaError, match=r"'hopeful'.*greedy"):
        Engine.load(tiny_bundle, accept="hopeful")


def test_the_lossy_rule_runs_and_differs_in_name_only_by_choice(tiny_bundle: Path) -> None:
    lossy = Engine.load(tiny_bundle, profile="tree-8", accept="typical", threads=1)
    stream = lossy.generate("Hello there", stream=True, max_new_tokens=30)
    list(stream)
    assert 1 <= len(stream.tokens) <= 30
