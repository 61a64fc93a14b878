"""Chooses what each step verifies: the draft with the most expected tokens per millisecond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from medusa_profiles.profile import TreeProfile

from medusa_runtime.drafting.acceptance import HeadAcceptance, NgramAcceptance, Rate, chain_length
from medusa_runtime.drafting.ngram_index import Match
from medusa_runtime.drafting.probes import Probes
from medusa_runtime.drafting.step_times import Kind, StepTimes
from medusa_runtime.sampling_params import AUTO, HEADS
from medusa_runtime.structured.answer_grammar import NOT_FORCED, Forced

HYSTERESIS = 1.03  # how much better another tree has to be before it replaces the one in use
# Steps after which a draft that does not pay is tried again, times the square of its cost in plain steps: the cheapest
# ones show how many tokens are accepted, and the others only their time.
INFORMATIVE, OTHERS = 64, 192
CERTAIN = 5  # steps whose median is not wrong because some of them were disturbed
GUESS = 0.7  # probability that a token which a grammar nearly forces is accepted, before any was tried
PLAIN = TreeProfile.plain()


class Choice(NamedTuple):
    """What a step verifies.

    Args:
        profile: Tree of the heads' candidates; plain decoding has none.
        literals: Number of tokens of the continuation that was found, or of those that a grammar forces.
        forced: Whether they are the latter.
    """

    profile: TreeProfile
    literals: int
    forced: bool = False


@dataclass(frozen=True)
class DraftOptions:
    """What a decoder may verify.

    Args:
        profiles: Trees of the heads' candidates, with the probabilities of `HeadAcceptance`.
        literals: Numbers of literals, ascending; empty without n-grams.
        joint: Whether literals may stand beside the heads' candidates.
    """

    profiles: Mapping[TreeProfile, Sequence[float]]
    literals: Sequence[int]
    joint: bool = False

    def choices(self) -> list[Choice]:
        """Return everything that may be verified besides the root alone."""
        literals = [Choice(PLAIN, count) for count in self.literals]
        trees = [Choice(tree, count) for tree in self.profiles for count in (0, *(self.literals if self.joint else ()))]
        return [*trees, *literals]


class Experience:
    """What an engine has learned from all answers.

    Args:
        options: What may be verified.
        times: How long steps take.
    """

    def __init__(self, options: DraftOptions, times: StepTimes) -> None:
        self.options, self.times = options, times
        self.heads, self.ngrams = HeadAcceptance(options.profiles), NgramAcceptance()
        self.guesses = Rate(GUESS)  # of tokens that a grammar nearly forces
        self.probes = Probes()

    @classmethod
    def empty(cls) -> Experience:
        """Return the experience of a decoder that only verifies the root."""
        return cls(DraftOptions({}, ()), StepTimes())

    def of(self, draft: str) -> Experience | None:
        """Return this experience with the options of a kind of draft; None for the decoder's tree alone."""
        if draft == HEADS:
            return None
        if draft == AUTO:
            return self
        limited = copy(self)
        limited.options = replace(self.options, profiles={}, joint=False)
        return limited


class Controller:
    """Chooses the drafts of one answer.

    Args:
        experience: What was learned before; it learns from this answer too.
    """

    def __init__(self, experience: Experience) -> None:
        self._options, self._times = experience.options, experience.times
        self._heads = HeadAcceptance(experience.options.profiles, experience.heads)
        self._ngrams = NgramAcceptance(experience.ngrams)
        self._guesses = Rate(GUESS, experience.guesses)
        self._current = PLAIN if not experience.options.profiles else next(iter(experience.options.profiles))
        self._probes = experience.probes
        self._probed: tuple[Choice, float] | None = None  # what is tried, and the tokens per ms of what is in use

    def choose(self, match: Match | None, available: int, forced: Forced = NOT_FORCED) -> Choice:
        """Return what to verify next.

        Args:
            match: The earlier occurrence of the last tokens.
            available: How many tokens follow it.
            forced: Tokens that a grammar forces.
        """
        best, chosen = self._best(match, available, forced)
        probe = self._probe(0 if match is None else available)
        self._probed = None if probe is None else (probe, best)
        return chosen if probe is None else probe

    def _best(self, match: Match | None, available: int, forced: Forced) -> tuple[float, Choice]:
        """Return what is worth most, and its tokens per millisecond."""
        best, profile = self._best_profile()
        chosen = Choice(profile, 0)
        rate, literals = self._best_forced(forced)
        if rate > best:
            best, chosen = rate, Choice(PLAIN, literals, forced=True)
        if match is None or available < 1 or not self._options.literals:
            return best, chosen
        first, other = self._ngrams.expected(match.length)
        for literals in self._options.literals:
            if literals > available and literals > self._options.literals[0]:
                break
            gain = chain_length(first, other, min(literals, available))
            candidates = [(gain, Choice(PLAIN, literals))]
            if self._options.joint and profile.size > 1:
                candidates.append((gain + (1 - first) * self._heads.expected(profile), Choice(profile, literals)))
            for extra, choice in candidates:
                rate = (1 + extra) / self._times.ms(kind_of(choice))
                if rate > best:
                    best, chosen = rate, choice
        return best, chosen

    def _probe(self, available: int) -> Choice | None:
        """Return what to try although something else is expected to be worth more; None if nothing."""
        if not self._probes.is_time:
            return None
        trees, literals = self._options.profiles, [one for one in self._options.literals if one <= available]
        if not trees and not literals:
            return None
        smallest = min(trees, key=lambda tree: tree.size, default=PLAIN)
        informative = {Choice(PLAIN, 0), Choice(smallest, 0), Choice(PLAIN, min(literals, default=0))}
        plain, intervals = self._times.ms(kind_of(Choice(PLAIN, 0))), dict[Choice, float]()
        for one in (*(Choice(tree, 0) for tree in (PLAIN, *trees)), *(Choice(PLAIN, count) for count in literals)):
            kind = kind_of(one)
            cost = self._times.ms(kind) / plain if self._times.is_known(kind, CERTAIN) else 1.0
            intervals[one] = (INFORMATIVE if one in informative else OTHERS) * cost * cost
        return self._probes.due(intervals)

    def observe_forced(self, forced: Forced, tried: int, accepted: int) -> None:
        """Learn from a step that verified forced tokens.

        Args:
            forced: The tokens.
            tried: How many of the first ones, padding included.
            accepted: How many were accepted.
        """
        for at in forced.guesses:
            if at < tried and at <= accepted:
                self._guesses.add(at < accepted, 1)

    def observe(self, choice: Choice, match: Match | None, accepted: int, from_literals: bool, ms: float) -> None:
        """Learn from a step.

        Args:
            choice: What was verified.
            match: Where its literals came from.
            accepted: Accepted candidates.
            from_literals: Whether these were literals.
            ms: Duration of the step.
        """
        self._times.add(kind_of(choice), ms)
        probe, rate = self._probed or (None, 0.0)
        promising = (1 + accepted) / self._times.ms(kind_of(choice)) > rate
        self._probes.count(choice, probed=probe == choice, promising=promising)
        if choice.profile.size > 1 and not from_literals:
            self._heads.add(choice.profile, accepted)
        if choice.literals and match is not None:
            self._ngrams.add(match.length, accepted if from_literals else 0, choice.literals)

    def _best_forced(self, forced: Forced) -> tuple[float, int]:
        """Return the number of forced tokens that is worth most, padding included, and its tokens per millisecond."""
        if not forced.tokens or not self._options.literals:
            return 0.0, 0
        guess, guesses = self._guesses.value, set(forced.guesses)
        chances = list(accumulate((guess if at in guesses else 1.0 for at in range(len(forced.tokens))), mul))
        return max(
            ((1 + sum(chances[:literals])) / self._times.ms(kind_of(Choice(PLAIN, literals))), literals)
            for literals in self._options.literals
        )

    def _best_profile(self) -> tuple[float, TreeProfile]:
        """Return the tree of heads' candidates that is worth most, plain decoding among them, and its tokens per ms."""
        rates = {tree: self._rate(tree) for tree in (PLAIN, *self._options.profiles)}
        for tree, rate in rates.items():  # a guess of its time that is too large would never be corrected
            if len(rates) > 1 and not self._times.is_known(kind_of(Choice(tree, 0))):
                return rate, tree
        best = max(rates, key=rates.__getitem__)
        if rates[best] > HYSTERESIS * rates.get(self._current, 0.0):
            self._current = best
        return rates[self._current], self._current

    def _rate(self, tree: TreeProfile) -> float:
        extra = self._heads.expected(tree) if tree.size > 1 else 0.0
        return (1 + extra) / self._times.ms(kind_of(Choice(tree, 0)))


def kind_of(choice: Choice) -> Kind:
    """Return the kind of step that verifies a choice."""
    return Kind(choice.profile.size + choice.literals, heads=choice.profile.size > 1)
