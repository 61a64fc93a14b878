"""What an engine knows before its first answer: from a calibration, or guessed."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_profiles.catalogue import load_profile
from medusa_profiles.simulation import tokens_per_step
from medusa_runtime.drafting.options import GUESS, depth_rates, experience_of
from medusa_runtime.drafting.step_times import Kind
from medusa_runtime.facts import HeadFacts

from ...calibrations import acceptance, calibration
from ..fake_backend import FakeBackend

TREES = [load_profile(name) for name in ("tree-2", "tree-4", "tree-8", "tree-16")]
PLAIN = TreeProfile.plain()


def backend(*literals, **arguments):
    made = FakeBackend(**arguments)
    made.literal_counts = literals
    return made


def test_without_a_calibration_there_are_the_default_and_the_smallest_tree():
    found = experience_of(TREES[2], TREES, backend(1, 3), None)
    assert dict(found.options.profiles) == {TREES[2]: (GUESS,) * TREES[2].depth, TREES[0]: (GUESS,)}
    assert found.options.literals == (1, 3) and not found.options.joint
    assert dict(experience_of(PLAIN, TREES, backend(1), None).options.profiles) == {}
    assert list(experience_of(TREES[0], TREES, backend(1), None).options.profiles) == [TREES[0]]
    again = TreeProfile("chain-1", TREES[0].paths)  # the smallest tree under another name
    assert len(experience_of(TREES[2], [again, *TREES], backend(1), None).options.profiles) == 2
    times = found.times
    assert times.ms(Kind(1, False)) < times.ms(Kind(4, False)) < times.ms(Kind(4, True)) < times.ms(Kind(8, True))


def test_literals_join_trees_where_the_backend_runs_that_fast():
    mixing = backend(3)
    mixing.mixes_drafts = True
    found = experience_of(TREES[0], TREES, mixing, None).options
    assert found.joint and (TREES[0], 3) in [(one.profile, one.literals) for one in found.choices()]


def test_a_calibration_gives_times_and_probabilities():
    measured = calibration({1: 10.0, 2: 12.0, 4: 13.0, 8: 30.0}, acceptance([[0, 0, 1], [0, 1, 0], [1, 0, 0]] * 5))
    found = experience_of(TREES[1], TREES, backend(3), measured)
    assert TREES[3] not in found.options.profiles  # as many nodes were not measured
    for tree, rates in found.options.profiles.items():
        assert len(rates) == tree.depth and all(0 < rate < 1 for rate in rates)
    times = found.times
    assert times.ms(Kind(4, True)) / times.ms(Kind(1, False)) == pytest.approx(1.3)
    assert times.ms(Kind(4, False)) / times.ms(Kind(1, False)) == pytest.approx(1.12)


def test_what_was_not_measured_is_guessed_as_a_multiple_of_plain_decoding():
    measured = calibration({1: 10.0, 2: 12.0}, acceptance([[0, 0, 1]] * 5))
    times = experience_of(TREES[0], TREES, backend(15), measured).times
    assert 1.1 < times.ms(Kind(16, False)) / times.ms(Kind(1, False)) < 3


def test_step_times_count_without_an_acceptance():
    """Of a bundle without heads, or of heads that were calibrated without prompts."""
    measured = calibration({1: 10.0, 2: 11.0, 4: 13.0, 8: 30.0, 16: 120.0})
    times = experience_of(TREES[1], TREES, backend(1, 15), measured).times
    assert times.ms(Kind(4, True)) / times.ms(Kind(1, False)) == pytest.approx(14 / 11)  # behind the middle past
    bare = backend(1, 15)
    bare.heads = HeadFacts.none()
    times = experience_of(PLAIN, [], bare, measured).times
    assert times.ms(Kind(16, False)) / times.ms(Kind(1, False)) == pytest.approx(121 / 11)


def test_without_a_calibration_a_default_that_is_not_exact_is_left_out():
    quantised = backend(1)
    quantised.precision = "w8a8"
    found = experience_of(TREES[2], [TREES[0], TREES[1]], quantised, None)
    assert list(found.options.profiles) == [TREES[0]]


def test_probabilities_by_depth_give_the_tokens_per_step_of_the_simulation():
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 3, size=(4000, 3)).tolist()
    measured = acceptance(rows)
    hits, answers = measured.samples()
    for tree in (TREES[0], TREES[1], TreeProfile("wide", ((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))):
        expected = 1 + np.cumprod(depth_rates(tree, measured)).sum()
        assert expected == pytest.approx(tokens_per_step(tree, hits, answers), rel=0.01)


def test_few_trees_are_chosen_from_large_to_small():
    measured = calibration({1: 10.0, 2: 10.5, 4: 11.0, 8: 12.0, 16: 14.0}, acceptance([[0, 0, 0, 0, 0]] * 20))
    sizes = [tree.size for tree in experience_of(TREES[1], TREES, backend(), measured).options.profiles]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes) and sizes[-1] == 2


def test_on_a_gpu_nodes_cost_little_and_the_first_steps_of_a_shape_do_not_count():
    device = backend(7, summaries=True)
    device.padded_past_lengths = (256,)
    times = experience_of(TREES[3], TREES, device, None).times
    assert times.ms(Kind(16, True)) < 1.3 * times.ms(Kind(1, False))
    before = times.ms(Kind(16, True)) / times.ms(Kind(1, False))
    for _ in range(2):
        times.add(Kind(16, True), 500.0)  # a CUDA graph is captured
    assert times.ms(Kind(16, True)) / times.ms(Kind(1, False)) == before and not times.is_known(Kind(16, True))
    for _ in range(2):
        times.add(Kind(16, True), 2.0)
    assert times.is_known(Kind(16, True))
