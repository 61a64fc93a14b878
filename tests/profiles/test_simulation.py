import numpy as np
import pytest
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import best_tree
from medusa_profiles.simulation import best_decoding_tree, steps_taken, tokens_per_step

FORK = TreeProfile("fork", ((0,), (1,), (0, 0)))


def literal(profile, hits, answers):
    """Decode answer by answer, step by step."""
    taken = np.zeros(len(hits), bool)
    for answer in dict.fromkeys(answers.tolist()):
        places = np.flatnonzero(answers == answer)
        at, end = places[0], places[-1]
        while at <= end:
            taken[at] = True
            kept = 0
            while kept < profile.depth and tuple(hits[at, : kept + 1]) in profile.paths:
                kept += 1
            at += kept + 1
    return taken


def samples(seed, size=400, heads=3):
    rng = np.random.default_rng(seed)
    hits = np.minimum(rng.geometric(0.5, (size, heads)) - 1, 4)
    hits[rng.random((size, heads)) < 0.2] = -1
    answers = np.sort(rng.integers(0, 9, size)) * 7 - 3
    return hits, answers


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_those_of_decoding_one_by_one(seed):
    hits, answers = samples(seed)
    tree = best_tree(hits, int(np.random.default_rng(seed).integers(1, 30)), "t")
    expected = literal(tree, hits, answers)
    np.testing.assert_array_equal(steps_taken(tree, hits, answers), expected)
    assert tokens_per_step(tree, hits, answers) == len(hits) / expected.sum()


def test_an_answer_ends_where_the_next_begins():
    hits = np.zeros((5, 2), int)
    assert steps_taken(FORK, hits, np.array([0, 0, 0, 0, 0])).tolist() == [True, False, False, True, False]
    assert steps_taken(FORK, hits, np.array([0, 0, 1, 1, 1])).tolist() == [True, False, True, False, False]
    assert steps_taken(TreeProfile.plain(), hits, np.zeros(5, int)).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("nodes", [2, 5, 12])
def test_the_tree_found_is_at_least_as_good_as_the_one_for_all_positions(seed, nodes):
    hits, answers = samples(seed)
    found = best_decoding_tree(hits, answers, nodes, "t", "here")
    assert (found.size, found.name, found.source) == (nodes, "t", "here")
    assert tokens_per_step(found, hits, answers) >= tokens_per_step(best_tree(hits, nodes, "t"), hits, answers)


def test_a_tree_is_fitted_on_the_steps_that_it_takes():
    """Over all positions the chain is best (0 0 starts 3 of 5), but it jumps over those, and stops at the 1s."""
    hits, answers = np.tile([[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]], (24, 1)), np.zeros(120, int)
    chain, found = best_tree(hits, 3, "t"), best_decoding_tree(hits, answers, 3, "t")
    assert (chain.paths, found.paths) == (((0,), (0, 0)), ((0,), (1,)))
    assert tokens_per_step(chain, hits, answers) == pytest.approx(5 / 3)
    assert tokens_per_step(found, hits, answers) == 2.0


def test_what_cannot_be_judged():
    hits = np.zeros((3, 1), int)
    with pytest.raises(ProfileError, match="3 samples, but answers of 2"):
        steps_taken(FORK, hits, np.zeros(2, int))
    with pytest.raises(ProfileError, match="2 deep"):
        steps_taken(FORK, hits, np.zeros(3, int))
    with pytest.raises(ProfileError, match="at least one"):
        tokens_per_step(TreeProfile.plain(), hits[:0], np.zeros(0, int))
