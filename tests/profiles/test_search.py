import itertools

import numpy as np
import pytest
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import best_tree, expected_tokens


def every_tree(ranks, depth, candidates):
    """Every well-formed tree of that many candidates over all paths up to a depth."""
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=d)]
    for chosen in itertools.combinations(paths, candidates):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield TreeProfile("x", chosen)


def tokens_by_walking(profile, hits):
    """Mean tokens per step, by walking down from the root at each sample."""
    total = 0
    for row in hits.tolist():
        path = ()
        while len(path) < len(row) and (*path, row[len(path)]) in profile.paths:
            path = (*path, row[len(path)])
        total += 1 + len(path)
    return total / len(hits)


def skewed_hits(rng, samples, heads, ranks):
    """Ranks that favour 0, with misses."""
    hits = np.minimum(rng.geometric(0.5, (samples, heads)) - 1, ranks)
    return np.where(hits == ranks, -1, hits)


def test_a_tiny_case_by_hand():
    hits = np.array([[0, 0, -1], [0, 0, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0]])
    profile = best_tree(hits, 4, "tiny", "five samples")
    assert profile == TreeProfile("tiny", ((0,), (0, 0), (1,)), "five samples")
    assert expected_tokens(profile, hits) == pytest.approx(1 + 3 / 5 + 2 / 5 + 1 / 5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("candidates", [1, 2, 3, 4])
def test_no_tree_of_that_size_is_better(seed, candidates):
    rng = np.random.default_rng(seed)
    hits = skewed_hits(rng, 25, heads=3, ranks=2)
    found = best_tree(hits, candidates + 1, "x")
    best = max(tokens_by_walking(profile, hits) for profile in every_tree(2, 3, candidates))
    assert found.size == candidates + 1
    assert expected_tokens(found, hits) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_expected_tokens_agree_with_walking_the_tree(seed):
    rng = np.random.default_rng(seed)
    fitted, measured = skewed_hits(rng, 400, 4, 6), skewed_hits(rng, 300, 4, 6)
    profile = best_tree(fitted, 24, "x")
    assert expected_tokens(profile, measured) == pytest.approx(tokens_by_walking(profile, measured))


def test_a_larger_tree_holds_the_smaller_one():
    hits = skewed_hits(np.random.default_rng(0), 300, 4, 6)
    trees = [best_tree(hits, nodes, "x") for nodes in range(1, 30)]
    for smaller, larger in itertools.pairwise(trees):
        assert set(smaller.paths) < set(larger.paths)


def test_ties_put_parents_first_and_then_lower_ranks():
    hits = np.array([[1, 1], [0, 0]])
    assert best_tree(hits, 2, "x").paths == ((0,),)
    assert best_tree(hits, 3, "x").paths == ((0,), (1,))
    assert best_tree(hits, 4, "x").paths == ((0,), (0, 0), (1,))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_order_of_samples_and_integer_type_do_not_matter(dtype):
    rng = np.random.default_rng(1)
    hits = skewed_hits(rng, 200, 4, 6)
    assert best_tree(rng.permutation(hits).astype(dtype), 20, "x") == best_tree(hits, 20, "x")


def test_unsigned_hits_are_ranks_too():
    assert best_tree(np.array([[0, 3]], np.uint64), 3, "x").paths == ((0,), (0, 3))


def test_a_root_needs_no_samples():
    assert best_tree(np.empty((0, 3), np.int32), 1, "x") == TreeProfile("x", ())
    assert expected_tokens(TreeProfile.plain(), np.empty((2, 0), np.int32)) == 1


def test_too_few_distinct_prefixes():
    hits = np.array([[0, 0], [0, 0], [1, -1], [-1, 5]])
    assert best_tree(hits, 4, "x").size == 4
    with pytest.raises(ProfileError) as caught:
        best_tree(hits, 5, "x")
    assert str(caught.value) == (
        "a tree of 5 nodes needs 4 distinct rank prefixes but the 4 samples hold only 3; "
        "measure more samples, keep more ranks or ask for at most 4 nodes"
    )


def test_a_miss_ends_the_prefix():
    hits = np.array([[-1, 0, 0]] * 5)
    assert expected_tokens(TreeProfile("x", ((0,), (0, 0))), hits) == 1
    with pytest.raises(ProfileError, match="hold only 0"):
        best_tree(hits, 2, "x")


@pytest.mark.parametrize("hits", [np.zeros(3, np.int32), np.zeros((1, 2, 3), np.int32)])
def test_hits_of_another_shape_are_refused(hits):
    for call in (lambda: best_tree(hits, 2, "x"), lambda: expected_tokens(TreeProfile.plain(), hits)):
        with pytest.raises(ProfileError, match=r"^hits must be integers of shape \(samples, heads\), got int32 of"):
            call()


def test_hits_that_are_no_ranks_are_refused():
    with pytest.raises(ProfileError, match=r"^hits must be integers of shape \(samples, heads\), got float64 of"):
        best_tree(np.zeros((2, 2)), 2, "x")
    with pytest.raises(ProfileError, match=r"^hits must be ranks, or -1 for a miss; got -2$"):
        best_tree(np.array([[-2]]), 2, "x")


def test_other_refusals():
    hits = np.zeros((4, 2), np.int32)
    with pytest.raises(ProfileError, match=r"^a tree has at least 1 node, its root; got nodes = 0$"):
        best_tree(hits, 0, "x")
    with pytest.raises(ProfileError, match=r"^expected tokens need at least one sample, got none$"):
        expected_tokens(TreeProfile.plain(), hits[:0])
    with pytest.raises(ProfileError, match=r"^tree 'x' is 3 deep but the samples cover 2 heads$"):
        expected_tokens(TreeProfile("x", ((0,), (0, 0), (0, 0, 0))), hits)


@pytest.mark.parametrize("nodes", [2, 5, 17, 60])
def test_dropping_rare_prefixes_early_changes_nothing(nodes):
    hits = skewed_hits(np.random.default_rng(2), 500, heads=4, ranks=8)
    counts = {}
    for row in hits.tolist():
        for depth, path in enumerate(itertools.accumulate((rank,) for rank in row)):
            if row[depth] < 0:
                break
            counts[path] = counts.get(path, 0) + 1
    best = sorted(counts, key=lambda path: (-counts[path], len(path), path))[: nodes - 1]
    assert best_tree(hits, nodes, "x").paths == tuple(sorted(best))
