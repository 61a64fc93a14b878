"""Finds where two answers to one prompt first differ, and whether rounding can explain the difference.

Sums of floats depend on their order, so two graphs can rank two tokens differently if their logits are nearly equal:
that is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.decoder import Decoder
from medusa_runtime.tokenizer import Tokenizer

TOLERANCE = 1e-3  # in fp32 a gap of so much between two logits is a tie
# In other precisions, 16 bits included, rounding depends on the number of rows in a step. There a tie is a gap of this
# share of the range between the lowest and the highest logit.
ROUNDED_TOLERANCE = 0.01

NextLogits = Callable[[list[int]], FloatArray]  # token ids -> the logits of the token after them, shape (V,)


@dataclass(frozen=True)
class AnswerDifference:
    """The first difference between two answers to one prompt.

    Attributes:
        position: Index of the token in the answer, from 0.
        expected: The token id that was expected there; None if the expected answer had ended.
        got: The token id that was found there; None if that answer had ended.
        gap: The highest logit minus that of the less likely one of the two tokens; None if an answer had ended or a
            logit is not finite.
        share: The gap as a share of the range between the lowest and the highest logit.
        exact: Whether the precision is fp32, so that only the order of sums can change a logit (see `is_exact`).
    """

    position: int
    expected: int | None
    got: int | None
    gap: float | None
    share: float | None = field(default=None, compare=False)
    exact: bool = True

    @property
    def fails(self) -> bool:
        """Whether this is more than a tie: above TOLERANCE in fp32, above ROUNDED_TOLERANCE in other precisions."""
        if self.gap is None:
            return True
        return self.gap > TOLERANCE if self.exact else self.share is None or self.share > ROUNDED_TOLERANCE

    def describe(self, tokenizer: Tokenizer) -> str:
        """Describe in one line which token was expected, which was found and how far apart they are."""
        got, expected = (_shown(token, tokenizer) for token in (self.got, self.expected))
        gap = "logit gap unknown" if self.gap is None else f"logit gap {self.gap:.2e}"
        verdict = f"not a tie (at most {TOLERANCE:g})" if self.fails else "a tie in float"
        if not self.exact:
            gap += "" if self.share is None else f", {self.share:.2%} of the row's range"
            verdict = f"not a tie (at most {ROUNDED_TOLERANCE:.0%})" if self.fails else "a tie by rounding"
        return f"token {self.position} is {got}, expected {expected}; {gap}, {verdict}"


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Return the first index at which two lists of tokens differ, at most the shorter length; None if equal."""
    for index, pair in enumerate(zip(expected, got, strict=False)):
        if pair[0] != pair[1]:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


def is_exact(precision: str) -> bool:
    """Whether a graph in this precision gives the same tokens for any number of rows in a step, except for ties."""
    return precision == "fp32"


def tolerances(exact: bool) -> dict[str, float | None]:
    """Return what counts as a tie, for reports: in logits, or as a share of the range of the logits."""
    return {
        "gap_tolerance": TOLERANCE if exact else None,
        "gap_share_tolerance": None if exact else ROUNDED_TOLERANCE,
    }


def compare_answers(
    prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], *readers: NextLogits, exact: bool = True
) -> AnswerDifference | None:
    """Compare two answers to `prompt`.

    Args:
        prompt: Token ids of the prompt.
        expected: Token ids of one answer.
        got: Token ids of the other answer.
        readers: Functions that return the logits after the prompt and the tokens that both answers share. The gap is
            measured by each of them, and the widest one counts.
        exact: See `AnswerDifference`.

    Returns:
        The first difference, or None if the answers are equal.
    """
    position = first_difference(expected, got)
    if position is None:
        return None
    if position >= min(len(expected), len(got)):
        ends = [answer[position] if position < len(answer) else None for answer in (expected, got)]
        return AnswerDifference(position, ends[0], ends[1], None, exact=exact)
    ids, pair = [*prompt, *expected[:position]], (expected[position], got[position])
    gaps, shares = zip(*(_gap(reader(ids), pair) for reader in readers), strict=True)
    finite = all(map(math.isfinite, gaps))
    return AnswerDifference(
        position, *pair, max(gaps) if finite else None, max(shares) if finite else None, exact=exact
    )


def next_logits(decoder: Decoder) -> NextLogits:
    """Return a reader that prefills the tokens; an answer that the decoder has not finished is lost."""

    def read(ids: list[int]) -> FloatArray:
        decoder.start(ids, 1, stop_ids=())
        return decoder.backend.read_logits(0)

    return read


def _gap(logits: FloatArray, tokens: tuple[int, int]) -> tuple[float, float]:
    """Return the highest logit minus that of the less likely token: in logits, and as a share of their range."""
    gap = float(logits.max()) - min(float(logits[token]) for token in tokens)
    reach = float(logits.max()) - float(logits.min())
    return gap, gap / reach if reach else math.inf if gap else 0.0


def _shown(token: int | None, tokenizer: Tokenizer) -> str:
    if token is None:
        return "no token (the answer had ended)"
    return f"{token} {tokenizer.decode([token])!r}" if tokenizer.token(token) else f"{token} (a special token)"
