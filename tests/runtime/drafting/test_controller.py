"""The controller finds the draft with the most tokens per millisecond, against every fixed choice in a simulation."""

from collections import Counter

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.drafting.controller import PLAIN, Choice, Controller, DraftOptions, Experience, kind_of
from medusa_runtime.drafting.ngram_index import Match
from medusa_runtime.drafting.step_times import StepTimes
from medusa_runtime.sampling_params import AUTO, HEADS, NGRAM

CHAINS = [TreeProfile(f"chain-{depth}", tuple((0,) * d for d in range(1, depth + 1))) for depth in (1, 2, 3)]
PRIOR = {tree: (0.6, 0.6, 0.6)[: tree.depth] for tree in CHAINS}
LITERALS = (1, 3, 7, 15)


class World:
    """A text in which heads and copied continuations are right with given probabilities, and steps that take a time."""

    def __init__(self, seed, heads=(0.6, 0.5, 0.5), copies=(0.9, 0.9), matches=0.3, row=0.05, cost=0.15):
        self._rng, self._heads, self._copies = np.random.default_rng(seed), heads, copies
        self._matches, self._row, self._cost = matches, row, cost

    def ms(self, choice):
        kind = kind_of(choice)
        return 10 * (1 + self._row * (kind.nodes - 1) + self._cost * kind.heads)

    def match(self):
        return Match(50, 8) if self._rng.random() < self._matches else None

    def accepted(self, choice, match):
        """Number of accepted candidates, and whether they were literals."""
        hits = self._rng.random(3) < np.array(self._heads)
        heads = int(np.cumprod(hits)[: choice.profile.depth].sum())
        first, other = self._copies if match else (0, 0)
        copied = self._rng.random(choice.literals) < np.array([first, *[other] * 20][: choice.literals])
        literals = int(np.cumprod(copied).sum())
        return max(heads, literals), literals > heads

    def run(self, steps, controller=None, fixed=None):
        """Tokens and milliseconds."""
        tokens = total = 0.0
        for _ in range(steps):
            match = self.match()
            choice = controller.choose(match, 30) if controller else fixed(match)
            accepted, from_literals = self.accepted(choice, match)
            if controller:
                ms = self.ms(choice) * self._rng.normal(1, 0.05)
                controller.observe(choice, match, accepted, from_literals, ms)
            tokens, total = tokens + 1 + accepted, total + self.ms(choice)
        return tokens, total


def experience(literals=LITERALS, profiles=PRIOR, **options):
    return Experience(DraftOptions(profiles, literals, **options), StepTimes())


WORLDS = {
    "good heads": {"heads": (0.8, 0.8, 0.8)},
    "noise": {"heads": (0, 0, 0), "copies": (0, 0)},
    "poor heads": {"heads": (0.3, 0.2, 0.1), "matches": 0.1},
    "copies": {"matches": 0.9, "copies": (0.98, 0.97)},
    "dear rows": {"row": 0.6, "heads": (0.5, 0.4, 0.3)},
    "dear heads": {"cost": 0.9, "heads": (0.5, 0.4, 0.3)},
}


@pytest.mark.parametrize("name", WORLDS)
def test_it_is_as_fast_as_the_best_fixed_choice(name):
    ways = {
        (tree.name, count): lambda match, tree=tree, count=count: (
            Choice(PLAIN, count) if match and count else Choice(tree, 0)
        )
        for tree in (PLAIN, *CHAINS)
        for count in (0, *LITERALS)
    }

    def speed(**arguments):
        runs = [
            World(answer, **WORLDS[name]).run(100, **{key: make() for key, make in arguments.items()})
            for answer in range(80)
        ]
        return np.sum(runs[5:], axis=0)

    shared = experience()
    tokens, ms = speed(controller=lambda: Controller(shared))
    best = max(np.divide(*speed(fixed=lambda choose=choose: choose)) for choose in ways.values())
    assert tokens / ms > 0.95 * best


def speed_of(shared, world, answers, length=100, disturbed=lambda number, choice: 1.0):
    """Tokens per millisecond of an engine that answers; `disturbed` multiplies the times that it is told."""
    tokens = total = number = 0
    for _ in range(answers):
        controller, before = Controller(shared), tokens
        while tokens - before < length:
            match = world.match()
            choice = controller.choose(match, 30)
            accepted, from_literals = world.accepted(choice, match)
            seen = world.ms(choice) * disturbed(number, choice)
            controller.observe(choice, match, accepted, from_literals, seen)
            tokens, total, number = tokens + 1 + accepted, total + world.ms(choice), number + 1
    return tokens / total


@pytest.mark.parametrize("slow", ["plain", "chain-1", "chain-3"])
def test_disturbed_first_steps_are_forgotten(slow):
    """On one kind of step, when its first steps are all that was seen of it."""
    counts = Counter()

    def disturbed(number, choice):
        counts[choice.profile.name] += 1
        return 5.0 if choice.profile.name == slow and counts[slow] <= 2 else 1.0

    for heads, best in (((0, 0, 0), 0.1), ((0.8, 0.8, 0.8), 2.952 / 13)):
        counts.clear()
        assert speed_of(experience(), World(1, heads, matches=0), 100, disturbed=disturbed) > 0.96 * best


def test_an_engine_that_began_slowly_finds_the_best():
    for steps in (1, 3, 6):
        slow = speed_of(experience(), World(2, (0, 0, 0), matches=0), 100, disturbed=lambda n, _: 1 + 9 * (n < steps))  # noqa: B023
        assert slow > 0.96 * 0.1, steps


def test_what_failed_in_earlier_answers_is_tried_again_in_short_ones():
    shared = experience()
    speed_of(shared, World(3, (0, 0, 0), matches=0), 20)
    assert speed_of(shared, World(4, (0.9, 0.9, 0.9), matches=0), 60, 40) > 0.93 * 3.439 / 13
    shared = experience(profiles={})
    speed_of(shared, World(5, copies=(0, 0), matches=0.9), 20, 200)
    assert speed_of(shared, World(6, copies=(0.95, 0.95), matches=0.9), 60, 40) > 5 * 0.1


@pytest.mark.parametrize("row", [0.2, 0.6])
def test_rows_that_cost_more_than_was_assumed_are_found_out(row):
    """With a match before every step nothing else would run, and all of the time be put down to the machine."""
    shared = experience(profiles={})
    assert speed_of(shared, World(7, copies=(0.3, 0.6), matches=1.0, row=row), 60) > 0.95 * 0.1


def test_without_a_match_there_are_no_literals_and_without_options_only_the_root():
    controller = Controller(experience())
    assert controller.choose(None, 0).literals == 0
    assert controller.choose(Match(4, 3), 0).literals == 0
    empty = Controller(Experience.empty())
    assert empty.choose(Match(4, 16), 20) == Choice(PLAIN, 0)
    assert Controller(experience(literals=())).choose(Match(4, 16), 20).literals == 0


def test_a_short_continuation_is_not_padded_to_a_long_chain():
    controller = Controller(experience())
    for _ in range(50):
        controller.observe(Choice(PLAIN, 15), Match(4, 16), 15, True, 10.0)
    assert controller.choose(Match(4, 16), 30).literals == 15
    assert controller.choose(Match(4, 16), 3).literals == 3


def test_what_does_not_pay_is_tried_again_after_a_while():
    shared = experience()
    controller, tried = Controller(shared), {"heads": 0, "literals": 0}
    world = World(0, heads=(0, 0, 0), copies=(0, 0))
    for number in range(600):
        match = Match(50, 3) if number % 2 else None
        choice = controller.choose(match, 30)
        controller.observe(choice, match, 0, False, world.ms(choice))
        if number > 100:
            tried["heads"] += choice.profile.size > 1
            tried["literals"] += choice.literals > 0
    assert 3 <= tried["heads"] <= 15 and 3 <= tried["literals"] <= 15


def test_literals_stand_beside_the_heads_where_that_pays():
    joint, alone = (Controller(experience(joint=kind)) for kind in (True, False))
    for controller in (joint, alone):
        for _ in range(15):  # before anything is tried again
            controller.observe(Choice(CHAINS[2], 0), None, 1, False, 11.5)
            controller.observe(Choice(PLAIN, 0), None, 0, False, 10.0)
    match = Match(9, 4)
    assert joint.choose(match, 30).profile.size > 1 and joint.choose(match, 30).literals > 0
    assert not (alone.choose(match, 30).profile.size > 1 and alone.choose(match, 30).literals > 0)


def test_kinds_of_drafts():
    shared = experience(joint=True)
    assert shared.of(AUTO) is shared and shared.of(HEADS) is None
    copies = shared.of(NGRAM)
    assert copies.options.literals == LITERALS and not copies.options.profiles and not copies.options.joint
    assert copies.ngrams is shared.ngrams and copies.times is shared.times and shared.options.profiles
