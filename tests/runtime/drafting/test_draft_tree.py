"""A tree of the heads' candidates with a chain of literals beside it."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.drafting.draft_tree import DraftTree

from ..fake_backend import random_tree

PLAIN = TreeProfile.plain()


def test_the_literals_follow_the_root_one_behind_the_other():
    tree = DraftTree(TreeProfile("t", ((0,), (0, 0), (1,))), 2)
    assert (tree.size, tree.depth, tree.first_literal, tree.drafts, tree.name) == (6, 2, 4, True, "t+ngram-2")
    assert tree.children == ((1, 3, 4), (2,), (), (), (5,), ())
    assert tree.depths.tolist() == [0, 1, 2, 1, 1, 2]
    assert tree.node_ids(10).tolist() == [0, -1, -11, -2, 0, 0]
    assert tree.mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("literals", [1, 3, 15])
def test_literals_alone_are_a_causal_chain_without_heads(literals):
    tree = DraftTree(PLAIN, literals)
    assert (tree.size, tree.depth, tree.first_literal, tree.drafts) == (literals + 1, literals, 1, False)
    assert (tree.mask == np.tri(literals + 1, dtype=bool)).all()
    assert tree.name == f"ngram-{literals}"
    assert tree.children == (*((node + 1,) for node in range(literals)), ())


def test_a_profile_alone_is_as_it_is():
    for seed in range(20):
        profile = random_tree(np.random.default_rng(seed), 12)
        tree = DraftTree(profile)
        assert tree.children == profile.children and (tree.mask == profile.mask).all()
        assert (tree.depths == profile.depths).all() and (tree.node_ids(6) == profile.candidate_ids(6)).all()
        assert (tree.name, tree.size, tree.depth) == (profile.name, profile.size, profile.depth)
    assert DraftTree(PLAIN).name == "plain" and DraftTree(PLAIN).children == ((),)


def test_mask_depths_and_children_agree():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tree = DraftTree(random_tree(rng, 9), int(rng.integers(0, 6)))
        parents = {child: node for node, children in enumerate(tree.children) for child in children}
        assert sorted(parents) == list(range(1, tree.size))
        for last in range(tree.size):
            node, ancestors = last, {last}
            while node in parents:
                node = parents[node]
                ancestors.add(node)
            assert set(np.flatnonzero(tree.mask[last])) == ancestors
            assert tree.depths[last] == len(ancestors) - 1
