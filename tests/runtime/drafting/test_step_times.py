"""Expected times of steps: the guess first, then what was measured, on machines whose speed changes."""

import numpy as np
import pytest
from medusa_runtime.drafting.step_times import NODE_COST, Kind, StepTimes

PLAIN, TREE, CHAIN = Kind(1, False), Kind(4, True), Kind(8, False)


def test_before_any_step_there_is_the_guess():
    times = StepTimes({PLAIN: 10.0, TREE: 14.0}.get)
    assert times.ms(TREE) / times.ms(PLAIN) == pytest.approx(1.4)
    assert StepTimes().ms(CHAIN) / StepTimes().ms(PLAIN) == pytest.approx(1 + 7 * NODE_COST)


def test_one_measured_kind_scales_the_guesses_of_the_others():
    times = StepTimes({PLAIN: 10.0, TREE: 14.0, CHAIN: 20.0}.get)
    for _ in range(30):
        times.add(PLAIN, 3.0)
    assert times.ms(PLAIN) == pytest.approx(3.0, rel=0.02)
    assert 0.8 < times.ms(TREE) / 4.2 < 3.4  # part of the deviation may be this kind's own


def test_measured_times_replace_a_wrong_guess():
    rng, times = np.random.default_rng(0), StepTimes({PLAIN: 10.0, TREE: 30.0}.get)
    for _ in range(60):
        for kind, ms in ((PLAIN, 10.0), (TREE, 12.0)):
            times.add(kind, ms * rng.normal(1, 0.05))
    assert times.ms(TREE) / times.ms(PLAIN) == pytest.approx(1.2, rel=0.05)


def test_a_slower_machine_changes_no_ratio():
    """Only one kind runs while the machine is slow, and both after it."""
    times = StepTimes({PLAIN: 10.0, TREE: 14.0}.get)
    for _ in range(40):
        times.add(PLAIN, 10.0), times.add(TREE, 14.0)
    for _ in range(40):
        times.add(TREE, 28.0)
    assert times.ms(TREE) / times.ms(PLAIN) == pytest.approx(1.4, rel=0.2)
    for _ in range(20):
        times.add(PLAIN, 20.0), times.add(TREE, 28.0)
    assert times.ms(TREE) / times.ms(PLAIN) == pytest.approx(1.4, rel=0.1)


def test_a_step_that_was_disturbed_counts_little():
    times = StepTimes({PLAIN: 10.0}.get)
    for _ in range(20):
        times.add(PLAIN, 10.0)
    times.add(PLAIN, 5000.0)
    assert times.ms(PLAIN) < 15
    times.add(PLAIN, 0.0)  # a clock that stood still says nothing
    assert 10 < times.ms(PLAIN) < 15
