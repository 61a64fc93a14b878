"""Generations and measurements with chosen times and token counts."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_exporter.answer_differences import AnswerDifference
from medusa_exporter.bench.timing import Measurement, Question, TimedAnswer
from medusa_profiles.profile import TreeProfile

CHAIN = TreeProfile("chain-2", ((0,), (0, 0)))


def run(tokens: int, steps: int, seconds: float, host: float = 0.0, first: int = 0, ttft: float = 0.0) -> TimedAnswer:
    """tokens with the prefill's one; the first step adds what is left over when every other adds one."""
    kept = [tokens - 1 - (steps - 1), *[1] * (steps - 1)] if steps else []
    return TimedAnswer(tuple(range(first, first + tokens)), tuple(kept), ttft, (seconds / max(steps, 1),) * steps, host)


def turn(
    plain: TimedAnswer,
    medusa: TimedAnswer,
    prompt: int = 1,
    number: int = 1,
    difference: AnswerDifference | None = None,
    ids: Sequence[int] = (1, 2),
) -> Measurement:
    differences = {} if difference is None else {CHAIN.name: difference}
    return Measurement(Question(prompt, number, tuple(ids), 64), plain, {CHAIN.name: medusa}, differences)
