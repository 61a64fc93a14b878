"""How many candidates of a draft to expect to be accepted: running means, of one answer and of all before it.

Each estimate is a ratio of two sums that fade with every observation. That of an answer begins at the estimate of all
answers, as if that had been observed a few times already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medusa_profiles.profile import TreeProfile

from medusa_runtime.drafting.ngram_index import MAX_MATCH

ALL, ONE = 0.995, 0.97  # what is left of an older observation: of all answers, of one answer
STRENGTH = 8.0  # observations that the estimate of all answers counts as in the one of an answer
FIRST_STRENGTH = 2.0  # and what was calibrated or guessed, on other texts, in the estimate of all answers
_BUCKETS = (2, 3, 4, 5, 8, 12, MAX_MATCH)  # the shortest match of each class


class Rate:
    """A ratio of sums, such as accepted over tried.

    Args:
        value: The estimate before any observation.
        base: The rate of all answers, which this one of a single answer begins at and falls back to; None for that.
    """

    def __init__(self, value: float, base: Rate | None = None) -> None:
        self._base, self._keep = base, ONE if base is not None else ALL
        self._prior = value
        self._part = self._whole = 0.0

    @property
    def value(self) -> float:
        """The estimate."""
        prior, strength = (self._prior, FIRST_STRENGTH) if self._base is None else (self._base.value, STRENGTH)
        return (self._part + strength * prior) / (self._whole + strength)

    def add(self, part: float, whole: float) -> None:
        """Count an observation, here and in the rate of all answers."""
        self._part, self._whole = self._keep * self._part + part, self._keep * self._whole + whole
        if self._base is not None:
            self._base.add(part, whole)


class NgramAcceptance:
    """How many tokens of a copied continuation are accepted, by the length of the match.

    The first token is accepted with one probability, and each further one, behind an accepted one, with another.

    Args:
        base: The acceptance of all answers, None for that.
    """

    def __init__(self, base: NgramAcceptance | None = None) -> None:
        before: Sequence[tuple[Rate | None, Rate | None]]
        before = base._rates if base is not None else [(None, None)] * len(_BUCKETS)
        # Measured for matches of 2 to 16 tokens: 0.5 to 1 of the first tokens, 0.8 to 0.95 of the others.
        guesses = [(0.5 + 0.45 * at / (len(_BUCKETS) - 1), 0.8 + 0.12 * at / (len(_BUCKETS) - 1)) for at in range(7)]
        self._rates: list[tuple[Rate, Rate]] = [
            (Rate(first, ours), Rate(other, theirs))
            for (first, other), (ours, theirs) in zip(guesses, before, strict=True)
        ]

    def expected(self, match_length: int) -> tuple[float, float]:
        """Return the two probabilities."""
        first, other = self._rates[_bucket(match_length)]
        return first.value, other.value

    def add(self, match_length: int, accepted: int, tried: int) -> None:
        """Count a step that tried so many tokens and accepted the first of them."""
        first, other = self._rates[_bucket(match_length)]
        first.add(accepted > 0, 1)
        if accepted > 0 and tried > 1:
            other.add(accepted - 1, min(accepted, tried - 1))


def chain_length(first: float, other: float, length: int) -> float:
    """Return the expected number of accepted tokens of a chain of `length`, from its two probabilities."""
    return first * (length if other >= 1 else (1 - other**length) / (1 - other))


def _bucket(match_length: int) -> int:
    return sum(match_length >= least for least in _BUCKETS[1:])


class HeadAcceptance:
    """How many candidates of the heads are accepted, by tree.

    An answer is easier or harder to guess than others: the probability that one depth more is accepted is that of the
    calibration times a factor, the same for all depths and trees, so that what one tree shows holds for the others.

    Args:
        expected: For each tree, the probability of each depth that one of its candidates is accepted behind an accepted
            candidate of the depth before, as calibrated or guessed.
        base: The acceptance of all answers, None for that.
    """

    def __init__(self, expected: Mapping[TreeProfile, Sequence[float]], base: HeadAcceptance | None = None) -> None:
        self._expected = expected
        self._factor: Rate = Rate(1.0, base._factor if base is not None else None)

    def expected(self, profile: TreeProfile) -> float:
        """Return how many candidates of a step to expect."""
        factor, reached, total = self._factor.value, 1.0, 0.0
        for probability in self._expected[profile]:
            reached *= min(1.0, factor * probability)
            total += reached
        return total

    def add(self, profile: TreeProfile, accepted: int) -> None:
        """Count a step."""
        self._factor.add(accepted, sum(self._expected[profile][: accepted + 1]))
