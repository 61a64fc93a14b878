"""The inputs of a tree's steps are made once and the last few are kept."""

import numpy as np
import pytest
from medusa_profiles import ProfileError, TreeProfile
from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import HeadFacts
from medusa_runtime.step_cache import MAX_CACHED_STEPS, StepCache

from .decoding import CHAIN
from .fake_backend import random_tree

HEADS = HeadFacts(5, 1, "none", 6)


def test_an_equal_tree_has_the_same_inputs():
    cache = StepCache(HEADS)
    assert cache.get(CHAIN) is cache.get(TreeProfile("chain", CHAIN.paths))
    assert cache.get(CHAIN, summaries=True) is not cache.get(CHAIN)
    assert cache.get(CHAIN, summaries=True).step.summaries and not cache.get(CHAIN).step.summaries


def test_only_the_last_few_are_kept():
    rng, cache = np.random.default_rng(4), StepCache(HEADS)
    first = cache.get(CHAIN)
    for size in range(5, 5 + MAX_CACHED_STEPS):
        cache.get(random_tree(rng, size))
    again = cache.get(CHAIN)
    assert again is not first and again.tree.profile == CHAIN


def test_trees_that_do_not_fit_and_other_types_are_refused():
    cache = StepCache(HEADS)
    with pytest.raises(ProfileError, match="depth 6"):
        cache.get(TreeProfile("deep", tuple((0,) * depth for depth in range(1, 7))))
    with pytest.raises(ArgumentError, match="the profile is 'tree-4', of type str; expected a TreeProfile"):
        cache.get("tree-4")


def test_literals_are_a_step_of_their_own():
    cache = StepCache(HEADS)
    alone, beside = cache.get(CHAIN), cache.get(CHAIN, literals=3)
    assert beside is not alone and beside is cache.get(CHAIN, literals=3) and alone is cache.get(CHAIN)
    beside.update(5, 10, [7, 8, 6])
    assert beside.step.input_ids[0, 0] == 5 and beside.step.input_ids[0, -3:].tolist() == [7, 8, 6]
    assert beside.step.position_ids[0, -3:].tolist() == [11, 12, 13]
