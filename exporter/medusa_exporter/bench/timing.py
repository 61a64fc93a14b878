"""One prompt answered by plain decoding and by every tree, one after the other, on one backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends.step_shape import padded_past_length
from medusa_runtime.decoder import Decoder
from medusa_runtime.facts import PLAIN

from medusa_exporter.answer_differences import Difference, compare, is_exact, next_logits
from medusa_exporter.bench.forced_acceptance import RecordedAcceptance

RECENT = 4  # questions: a backend holds so many shapes and no more, so one that was not met for longer may be forgotten
WARM_TOKENS = 4  # of an answer that only warms up: three steps, of which a tree takes one at least

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """A prompt to answer; `prompt` and `turn` count from 1. ends: whether the model's end tokens end the answer."""

    prompt: int
    turn: int
    ids: tuple[int, ...]
    max_new_tokens: int
    ends: bool = True


@dataclass(frozen=True)
class Generation:
    """One decode.

    tokens: the answer's, the prefill's one included. kept: how many tokens each step added. first_seconds: from handing
    over the prompt's ids to the first token. step_seconds: wall time of each step. host_seconds: the part of all
    steps that is not the backend's own run: binding, accept rule, commit.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    first_seconds: float
    step_seconds: tuple[float, ...]
    host_seconds: float

    @property
    def steps(self) -> int:
        """How many there were."""
        return len(self.step_seconds)

    @property
    def seconds(self) -> float:
        """All steps together."""
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Measurement:
    """One question answered by plain decoding and by every tree, on one backend."""

    question: Question
    plain: Generation
    trees: dict[str, Generation]  # by profile
    differences: dict[str, Difference] = field(default_factory=dict)  # by profile, where tokens part from plain's

    def run(self, profile: str) -> Generation:
        """The answer by a tree, or by "plain"."""
        return self.plain if profile == PLAIN else self.trees[profile]


def generate_timed(
    decoder: Decoder, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] | None = None
) -> Generation:
    """Answer one prompt with the decoder's present tree, timing prefill and steps.

    Raises PromptError or CapacityError for a prompt that cannot be answered.
    """
    started = perf_counter()
    decoder.start(prompt_ids, max_new_tokens, stop_ids)
    first = perf_counter() - started
    sequence, backend = decoder.sequence, decoder.backend
    assert sequence is not None  # noqa: S101 -- start() has just set it
    kept, seconds, device = [], [], 0.0
    while sequence.finish_reason is None:
        started = perf_counter()
        taken = decoder.step()
        seconds.append(perf_counter() - started)
        device += backend.run_seconds
        kept.append(len(taken))
    return Generation(tuple(sequence.answer), tuple(kept), first, tuple(seconds), sum(seconds) - device)


class TimedDecoder:
    """Answers questions on one decoder and times every answer."""

    def __init__(
        self,
        decoder: Decoder,
        trees: Sequence[TreeProfile],
        recording: RecordedAcceptance | None = None,
        *,
        warm: bool = True,
    ) -> None:
        self._decoder, self._recording, self._warm = decoder, recording, warm
        self._modes = [TreeProfile.plain(), *trees]
        self._accept = decoder.accept
        self._asked = 0  # questions so far
        self._seen: dict[tuple[str, int, int], int] = {}  # shapes that are warm, and in which question they last ran
        if warm:  # the largest tree first, so that a backend allocates the memory of its results once
            for mode in sorted(self._modes, key=lambda one: -one.size):
                decoder.set_profile(mode)
                generate_timed(decoder, [0], WARM_TOKENS, ())

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer by plain decoding and every tree; the first of them is number `shift`, counted round and round."""
        runs = {}
        self._asked += 1
        for mode in rotated(self._modes, shift):
            self._decoder.set_profile(mode)
            if self._warm:
                self._warm_up(mode, question)
            if self._recording is not None and mode.name != PLAIN:
                self._decoder.accept = self._recording.rule(mode.name, question.prompt + question.turn)
            stop_ids = None if question.ends else ()
            runs[mode.name] = generate_timed(self._decoder, question.ids, question.max_new_tokens, stop_ids)
            self._decoder.accept = self._accept
        plain = runs.pop(PLAIN)
        trees = {mode.name: runs[mode.name] for mode in self._modes if mode.name in runs}
        return Measurement(question, plain, trees, {} if self._recording else self._differences(question, plain, trees))

    def _warm_up(self, mode: TreeProfile, question: Question) -> None:
        """Run untimed what the clock must not see: buffers being made, kernels being chosen, graphs being captured.

        A GPU's step is captured in the second run of its shape, and a past beyond 256, 512, 1,024, … rows is another
        shape: where a question's past crosses such a length, its whole answer is decoded twice, else its first steps.
        While a shape is met again and again a few steps suffice, so that a tree's arrays are bound.
        """
        first = padded_past_length(len(question.ids))
        last = padded_past_length(len(question.ids) + question.max_new_tokens)
        shape = (mode.name, first, last)
        if self._seen.get(shape, -RECENT) < self._asked - RECENT:
            tokens = WARM_TOKENS if first == last else question.max_new_tokens
            for _ in range(2):
                generate_timed(self._decoder, question.ids, tokens, ())
        else:
            generate_timed(self._decoder, [0], WARM_TOKENS, ())
        self._seen[shape] = self._asked

    def _differences(
        self, question: Question, plain: Generation, trees: dict[str, Generation]
    ) -> dict[str, Difference]:
        reader, exact = next_logits(self._decoder), is_exact(self._decoder.backend.precision)
        found = {
            name: compare(question.ids, plain.tokens, run.tokens, reader, exact=exact) for name, run in trees.items()
        }
        return {name: difference for name, difference in found.items() if difference is not None}


def rotated(items: Sequence[Item], shift: int) -> list[Item]:
    """The items, beginning with number `shift` (round and round), so that each comes first in its turn."""
    shift %= len(items)
    return [*items[shift:], *items[:shift]]
