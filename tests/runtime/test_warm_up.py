"""Warming up: one step of every shape that answers can need, with summaries where the trees have them."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.tree_step import TreeStep
from medusa_runtime.warm_up import warm_up_steps

from .fake_backend import FakeBackend

TREE = TreeProfile("chain", ((0,), (0, 0), (0, 1)))


def shapes(kinds, chunk=4, context=64):
    backend = FakeBackend(context=context)
    backend.prefill_chunk, backend.padded_past_lengths = chunk, (8, 16)
    trees = [TreeStep(tree, 6, summaries) for tree in (TreeProfile.plain(), TREE) for summaries in kinds]
    return [
        (step.input_ids.shape[1], int(step.past_length[0]), step.draft, step.summaries)
        for step in warm_up_steps(backend, KvCache(backend), [*trees, trees[0]])
    ]


@pytest.mark.parametrize("kinds", [(False,), (True,), (False, True)])
def test_every_shape_once_and_prompts_of_the_kinds_of_the_trees(kinds):
    trees = [(size, past, size > 1, kind) for past in (8, 16) for size in (1, 4) for kind in kinds]
    prompts = [(size, past, False, kind) for past in (8, 16) for size in (1, 2, 4) for kind in kinds]
    assert shapes(kinds) == trees + prompts


def test_what_does_not_fit_the_context_is_left_out():
    assert all(length >= 0 and size + length <= 10 for size, length, _, _ in shapes((True,), 16, context=10))


def test_a_tree_step_asks_for_summaries_for_its_whole_life():
    one, other = TreeStep(TREE, 6), TreeStep(TREE, 6, summaries=True)
    assert (one.step.summaries, other.step.summaries) == (False, True)
    other.update(5, 9)
    assert other.step.summaries and other.step.input_ids[0].tolist() == [5, -1, -7, -8]
    np.testing.assert_array_equal(one.step.logit_rows, other.step.logit_rows)
