"""Conversations: which backend answers what, in which order, and what is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from medusa_exporter.bench import timing
from medusa_exporter.bench.conversations import BackendMeasurements, Skipped, ask_each, converse
from medusa_exporter.bench.timing import Measurement, Question, TimedDecoder, generate_timed, rotated
from medusa_exporter.prompts import Turns
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.step_shape import padded_past_length
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import PromptError
from medusa_runtime.loading import LoadedBundle, load_bundle

from .factories import CHAIN, run


@pytest.fixture(scope="module")
def loaded(tiny_bundle: object) -> LoadedBundle:
    return load_bundle(str(tiny_bundle), profile="plain", threads=1)


def walk(
    loaded: LoadedBundle, prompts: list[Turns], trees: list[TreeProfile], **options: object
) -> Iterator[Measurement | Skipped]:
    """Return what one backend answers."""
    runner = TimedDecoder(loaded.decoder, trees, warm=bool(options.pop("warm", False)))
    asked = converse({"it": runner}, loaded.prompt_encoder, loaded.bundle.model.context, prompts, **options)  # type: ignore[arg-type]
    for answers in asked:
        yield answers if isinstance(answers, Skipped) else answers["it"]


class Scripted:
    """A backend that says what it was asked; from question number `fails` on it has failed."""

    def __init__(self, name: str, log: list[str], fails: int = 99) -> None:
        self.name, self.log, self.fails = name, log, fails

    def answer(self, question: Question, shift: int) -> Measurement | None:
        if question.prompt >= self.fails:
            return None
        self.log.append(f"{self.name}{question.prompt}.{question.turn}")
        first = ord(self.name)  # each its own tokens
        return Measurement(question, run(3, 2, 0.1, first=first), {})


def test_a_generation_counts_tokens_and_host_time(loaded: LoadedBundle) -> None:
    ids = loaded.prompt_encoder.encode("a b c")
    for tree in (TreeProfile.plain(), loaded.bundle.profile("tree-8")):
        loaded.decoder.set_profile(tree)
        for limit in (1, 2, 17):
            done = generate_timed(loaded.decoder, ids, limit)
            assert len(done.tokens) == limit
            assert (done.steps == limit - 1) if tree.size == 1 else (done.steps <= limit - 1)
            assert sum(done.kept) == limit - 1
            assert len(done.kept) == done.steps
            assert 0 <= done.host_seconds <= done.seconds
            assert (done.seconds > 0) == (limit > 1)
            assert done.first_seconds > 0


def test_every_profile_runs_at_every_position(loaded: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    once = generate_timed

    def logged(decoder: Decoder, ids: object, limit: int, stop_ids: object = None) -> object:
        if limit == 3:  # a warm-up takes 4
            timed.append(decoder.profile.name)
        return once(decoder, ids, limit, stop_ids)  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "generate_timed", logged)
    trees = [loaded.bundle.profile(name) for name in ("chain-1", "tree-4")]
    prompts = [("one", "and then?"), ("two",), ("three",), ("four",)]
    turns = list(walk(loaded, prompts, trees, max_new_tokens=3))
    one, two, three = ["plain", "chain-1", "tree-4"], ["chain-1", "tree-4", "plain"], ["tree-4", "plain", "chain-1"]
    assert timed == [*one, *one, *two, *three, *one]
    found = [(t.question.prompt, t.question.turn) for t in turns if isinstance(t, Measurement)]
    assert found == [(1, 1), (1, 2), (2, 1), (3, 1), (4, 1)]


def test_every_shape_that_is_timed_has_run_twice_before(loaded: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes: list[tuple[str, int, int]] = []
    once = generate_timed

    def logged(decoder: Decoder, ids: list[int], limit: int, stop_ids: object = None) -> object:
        decodes.append((decoder.profile.name, len(ids), limit))
        return once(decoder, ids, limit, stop_ids)  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "generate_timed", logged)
    runner = TimedDecoder(loaded.decoder, [loaded.bundle.profile("tree-4"), loaded.bundle.profile("tree-64")])
    assert decodes == [("tree-64", 1, 4), ("tree-4", 1, 4), ("plain", 1, 4)]  # the largest buffers first
    decodes.clear()
    short, crossing = tuple(range(3, 103)), tuple(3 + number % 90 for number in range(250))
    assert runner.answer(Question(1, 1, short, 6, stop_at_eos=False), 0) is not None
    assert decodes[:3] == [("plain", 100, 4), ("plain", 100, 4), ("plain", 100, 6)]
    decodes.clear()
    runner.answer(Question(2, 1, short, 6, stop_at_eos=False), 0)
    assert decodes[:2] == [("plain", 1, 4), ("plain", 100, 6)]  # met before
    decodes.clear()
    runner.answer(Question(3, 1, crossing, 12, stop_at_eos=False), 0)
    assert decodes[:3] == [("plain", 250, 12)] * 3  # from 256 rows to 512: all of it, twice
    decodes.clear()
    for number in range(4, 9):
        runner.answer(Question(number, 1, crossing, 12, stop_at_eos=False), 0)
        assert decodes[:2] == [("plain", 1, 4), ("plain", 250, 12)]
        decodes.clear()
    runner.answer(Question(9, 1, short, 6, stop_at_eos=False), 0)
    assert decodes[:3] == [("plain", 100, 4), ("plain", 100, 4), ("plain", 100, 6)]  # too long ago
    assert [padded_past_length(length) for length in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]


def test_a_second_message_is_asked_after_plain_decoding_s_own_answer(loaded: LoadedBundle) -> None:
    trees = [loaded.bundle.profile("tree-8")]
    first, second = walk(loaded, [("What is a tree?", "Write code")], trees, max_new_tokens=40)
    assert isinstance(first, Measurement)
    assert isinstance(second, Measurement)
    answer = loaded.tokenizer.decode(first.plain.tokens)
    assert second.question.ids == tuple(
        loaded.prompt_encoder.encode(
            [
                {"role": "user", "content": "What is a tree?"},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "Write code"},
            ]
        )
    )
    assert first.trees["tree-8"].tokens == first.plain.tokens
    assert first.trees["tree-8"].steps < first.plain.steps
    assert first.differences == second.differences == {}
    only = list(walk(loaded, [("What is a tree?", "Write code")], trees, max_new_tokens=4, first_only=True))
    assert len(only) == 1


def test_a_message_beyond_the_context_is_skipped_with_what_follows(loaded: LoadedBundle) -> None:
    prompts = [("word " * 600, "never asked"), ("short", "word " * 600), ("short",)]
    turns = list(walk(loaded, prompts, [CHAIN], max_new_tokens=2))
    assert [type(t).__name__ for t in turns] == ["Skipped", "Measurement", "Skipped", "Measurement"]
    assert isinstance(turns[0], Skipped)
    assert isinstance(turns[2], Skipped)
    assert [(t.prompt, t.turn) for t in (turns[0], turns[2])] == [(1, 1), (2, 2)]
    assert turns[0].tokens >= turns[0].context == loaded.bundle.model.context
    assert str(turns[0].tokens) in turns[0].describe()


def test_a_prompt_that_the_template_refuses_is_named(loaded: LoadedBundle) -> None:
    with pytest.raises(PromptError, match=r"prompt 2, turn 1: .*not valid Unicode"):
        list(walk(loaded, [("fine",), ("\ud800",)], [CHAIN], max_new_tokens=2))


def test_backends_alternate_on_the_first_backend_s_conversation(loaded: LoadedBundle) -> None:
    log: list[str] = []
    backends = {name: Scripted(name, log) for name in "ABC"}
    prompts = [("one", "and then?"), ("two",), ("three",), ("four",)]
    found = list(converse(backends, loaded.prompt_encoder, 512, prompts, max_new_tokens=3))
    assert log == [
        "A1.1", "B1.1", "C1.1", "A1.2", "B1.2", "C1.2", "B2.1", "C2.1", "A2.1", "C3.1", "A3.1", "B3.1",
        "A4.1", "B4.1", "C4.1",
    ]  # fmt: skip
    assert all(isinstance(answers, dict) and [*answers] == [*"ABC"] for answers in found)
    second = found[1]
    assert isinstance(second, dict)
    said = loaded.tokenizer.decode(run(3, 2, 0.1, first=ord("A")).tokens)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": said}]
    assert second["C"].question.ids == tuple(
        loaded.prompt_encoder.encode([*messages, {"role": "user", "content": "and then?"}])
    )


def test_other_backends_continue_after_a_failure_until_all_have_failed() -> None:
    log: list[str] = []
    prompts = [[1, 2], [3, 4], [5, 6], [7, 8]]

    def asked(a: int, b: int) -> list[BackendMeasurements]:
        return list(ask_each({"A": Scripted("A", log, a), "B": Scripted("B", log, b)}, prompts, 3))

    assert [[*answers] for answers in asked(99, 3)] == [["A", "B"], ["A", "B"], ["A"], ["A"]]
    assert [[*answers] for answers in asked(2, 4)] == [["A", "B"], ["B"], ["B"]]
    (question,) = {turn.question for turn in asked(99, 99)[1].values()}
    assert question == Question(2, 1, (3, 4), 3, stop_at_eos=False)


def test_rotation_puts_each_item_first_once() -> None:
    assert [rotated([1, 2, 3], shift) for shift in (0, 1, 2, 4)] == [[1, 2, 3], [2, 3, 1], [3, 1, 2], [2, 3, 1]]


def test_a_prompt_too_long_to_be_tokenised_is_skipped(loaded: LoadedBundle) -> None:
    long = "x" * (loaded.prompt_encoder.max_characters + 1)
    first, second = walk(loaded, [(long,), ("a b c",)], [], max_new_tokens=2)
    assert first == Skipped(1, 1, None, loaded.bundle.model.context)
    assert (
        first.describe() == "SKIPPED: more than 512 tokens of prompt leave no room for an answer in the context of 512"
    )
    assert isinstance(second, Measurement)
