"""Times the answers to one prompt, with plain decoding and with each tree in turn, on one backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.step_shape import padded_past_length
from medusa_runtime.decoder import Decoder
from medusa_runtime.facts import PLAIN

from medusa_exporter.answer_differences import AnswerDifference, compare_answers, is_exact, next_logits
from medusa_exporter.bench.forced_acceptance import RecordedAcceptance

RECENT = 4  # questions: a backend keeps that many step shapes, so an older one may have to be warmed up again
WARM_TOKENS = 4  # the length of a warm-up answer: three steps, at least one of which runs the tree

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """A prompt to answer.

    Attributes:
        prompt: Number of the conversation, from 1.
        turn: Number of the user message in the conversation, from 1.
        ids: Token ids of the prompt.
        max_new_tokens: Maximum number of tokens of the answer.
        stop_at_eos: Whether the model's end tokens end the answer; otherwise it has exactly `max_new_tokens` tokens.
    """

    prompt: int
    turn: int
    ids: tuple[int, ...]
    max_new_tokens: int
    stop_at_eos: bool = True


@dataclass(frozen=True)
class TimedAnswer:
    """An answer with the time that each part of it took.

    Attributes:
        tokens: Token ids of the answer; the prefill computes the first one.
        kept: Number of tokens that each step added.
        first_seconds: Time to the first token.
        step_seconds: Wall-clock time of each step.
        host_seconds: Time of all steps outside the backend's run: binding inputs, accepting tokens, committing KV cache
            rows.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    first_seconds: float
    step_seconds: tuple[float, ...]
    host_seconds: float

    @property
    def steps(self) -> int:
        """The number of decoding steps; the prefill is not counted."""
        return len(self.step_seconds)

    @property
    def seconds(self) -> float:
        """The wall time of all steps."""
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Measurement:
    """The answers to one question on one backend, with plain decoding and with each tree.

    Attributes:
        question: The question.
        plain: The answer with plain decoding.
        trees: The answer with each tree, by profile.
        differences: The first difference from the answer with plain decoding, by profile; equal answers are left out.
    """

    question: Question
    plain: TimedAnswer
    trees: dict[str, TimedAnswer]
    differences: dict[str, AnswerDifference] = field(default_factory=dict)

    def generation(self, profile: str) -> TimedAnswer:
        """Return the answer with a tree, or with plain decoding for "plain"."""
        return self.plain if profile == PLAIN else self.trees[profile]


def generate_timed(
    decoder: Decoder, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] | None = None
) -> TimedAnswer:
    """Answer one prompt with the tree that the decoder uses, and time the prefill and each step.

    Args:
        decoder: The decoder that generates.
        prompt_ids: Token ids of the prompt.
        max_new_tokens: Maximum number of tokens of the answer.
        stop_ids: Tokens that end the answer. Default: the model's end tokens.

    Raises:
        PromptError: The prompt is empty or has ids outside the vocabulary.
        CapacityError: The prompt does not fit the context.
    """
    started = perf_counter()
    decoder.start(prompt_ids, max_new_tokens, stop_ids)
    first = perf_counter() - started
    sequence, backend = decoder.sequence, decoder.backend
    assert sequence is not None  # noqa: S101 -- start() has just set it
    kept, seconds, device = [], [], 0.0
    while sequence.finish_reason is None:
        started = perf_counter()
        added = decoder.step()
        seconds.append(perf_counter() - started)
        device += backend.run_seconds
        kept.append(len(added))
    return TimedAnswer(tuple(sequence.answer), tuple(kept), first, tuple(seconds), sum(seconds) - device)


class TimedDecoder:
    """Answers questions with plain decoding and with each tree on one decoder, and times every answer."""

    def __init__(
        self,
        decoder: Decoder,
        trees: Sequence[TreeProfile],
        forced: RecordedAcceptance | None = None,
        *,
        warm: bool = True,
    ) -> None:
        """Warm the decoder up.

        Args:
            decoder: The decoder to time.
            trees: The profiles to time; plain decoding is always timed.
            forced: How many tokens each tree's steps keep, whatever the model computes. Default: the model decides.
            warm: Whether each answer is preceded by untimed steps.
        """
        self._decoder, self._forced, self._warm = decoder, forced, warm
        self._modes = [TreeProfile.plain(), *trees]
        self._accept = decoder.accept
        self._questions = 0  # answered so far
        self._warm_since: dict[tuple[str, int, int], int] = {}  # by step shape: the last question that ran it
        if warm:  # the largest tree first, so that a backend allocates its output buffers once
            for mode in sorted(self._modes, key=lambda one: -one.size):
                decoder.set_profile(mode)
                generate_timed(decoder, [0], WARM_TOKENS, ())

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer with plain decoding and with each tree, in an order rotated by `shift` (see `rotated`)."""
        answers = {}
        self._questions += 1
        for mode in rotated(self._modes, shift):
            self._decoder.set_profile(mode)
            if self._warm:
                self._warm_up(mode, question)
            if self._forced is not None and mode.name != PLAIN:
                self._decoder.accept = self._forced.rule(mode.name, question.prompt + question.turn)
            stop_ids = None if question.stop_at_eos else ()
            answers[mode.name] = generate_timed(self._decoder, question.ids, question.max_new_tokens, stop_ids)
            self._decoder.accept = self._accept
        plain = answers.pop(PLAIN)
        trees = {mode.name: answers[mode.name] for mode in self._modes if mode.name in answers}
        return Measurement(question, plain, trees, {} if self._forced else self._differences(question, plain, trees))

    def _warm_up(self, mode: TreeProfile, question: Question) -> None:
        """Run steps without timing them: they allocate buffers, choose kernels and capture CUDA graphs.

        A GPU captures a step in the second run of its shape, and the shape depends on the KV cache length, rounded up
        to 256, 512, 1,024, … rows. Where the answer crosses such a length, it is decoded twice as a whole, else only
        its first steps. A shape that ran recently needs just a few steps, which bind the tree's arrays.

        Example: a prompt of 250 tokens with 64 new ones runs with 256 and with 512 rows, so all of it is decoded twice.
        """
        first = padded_past_length(len(question.ids))
        last = padded_past_length(len(question.ids) + question.max_new_tokens)
        shape = (mode.name, first, last)
        if self._warm_since.get(shape, -RECENT) < self._questions - RECENT:
            tokens = WARM_TOKENS if first == last else question.max_new_tokens
            for _ in range(2):
                generate_timed(self._decoder, question.ids, tokens, ())
        else:
            generate_timed(self._decoder, [0], WARM_TOKENS, ())
        self._warm_since[shape] = self._questions

    def _differences(
        self, question: Question, plain: TimedAnswer, trees: dict[str, TimedAnswer]
    ) -> dict[str, AnswerDifference]:
        reader, exact = next_logits(self._decoder), is_exact(self._decoder.backend.precision)
        found = {
            name: compare_answers(question.ids, plain.tokens, answer.tokens, reader, exact=exact)
            for name, answer in trees.items()
        }
        return {name: difference for name, difference in found.items() if difference is not None}


def rotated(items: Sequence[Item], shift: int) -> list[Item]:
    """Return the items rotated by `shift`: ["a", "b", "c"] and 4 give ["b", "c", "a"]."""
    shift %= len(items)
    return [*items[shift:], *items[:shift]]
