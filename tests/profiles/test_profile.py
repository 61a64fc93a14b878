import copy
import dataclasses
import pickle

import numpy as np
import pytest
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import expected_tokens
from medusa_profiles.simulation import steps_taken

BRANCHED = TreeProfile("branched", ((0,), (1,), (0, 0), (0, 2), (0, 0, 1), (1, 0)))


def random_profile(rng, candidates):
    """A tree grown by hanging each new candidate under a random node, its paths shuffled."""
    paths = [()]
    while len(paths) <= candidates:
        path = (*paths[rng.integers(len(paths))], int(rng.integers(6)))
        if path not in paths:
            paths.append(path)
    return TreeProfile("random", tuple(paths[1 + i] for i in rng.permutation(candidates)))


def test_paths_are_put_in_depth_first_order():
    assert BRANCHED.paths == ((0,), (0, 0), (0, 0, 1), (0, 2), (1,), (1, 0))


def test_derived_arrays_of_a_known_tree():
    assert (BRANCHED.size, BRANCHED.depth, BRANCHED.max_rank, BRANCHED.chain_length) == (7, 3, 2, 2)
    np.testing.assert_array_equal(BRANCHED.parents, [-1, 0, 1, 2, 1, 0, 5])
    np.testing.assert_array_equal(BRANCHED.depths, [0, 1, 2, 3, 2, 1, 2])
    np.testing.assert_array_equal(BRANCHED.heads, [-1, 0, 1, 2, 1, 0, 1])
    np.testing.assert_array_equal(BRANCHED.ranks, [-1, 0, 0, 1, 2, 1, 0])
    assert BRANCHED.children == ((1, 5), (2, 4), (3,), (), (), (6,), ())
    np.testing.assert_array_equal(
        BRANCHED.mask.astype(int),
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0, 1, 1],
        ],
    )


def test_candidate_ids_follow_the_graph_contract():
    ids = BRANCHED.candidate_ids(10)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [0, -1, -11, -22, -13, -2, -11])
    ids[0] = 42
    assert BRANCHED.candidate_ids(10)[0] == 0


def test_candidate_ids_refuse_a_rank_that_would_name_another_head():
    with pytest.raises(ProfileError, match=r"rank 2 \(\[0, 2\]\) but the bundle keeps the top 2 of each head"):
        BRANCHED.candidate_ids(2)


def test_ranks_among_a_parents_candidates_fit_no_bundle_yet():
    tree = TreeProfile("sequential", ((0,), (0, 1)), candidates="parents")
    expected = "tree 'sequential' has candidates = 'parents', .*, which no graph offers yet; expected 'heads'"
    hits = np.zeros((4, 3), np.int64)
    for refused in (
        lambda: tree.check_fits(9, 9),
        lambda: tree.candidate_ids(9),
        lambda: expected_tokens(tree, hits),  # ranks of heads say nothing about it
        lambda: steps_taken(tree, hits, np.zeros(4, np.int64)),
    ):
        with pytest.raises(ProfileError, match=expected):
            refused()
    assert pickle.loads(pickle.dumps(tree)) == tree
    assert hash(tree) != hash(TreeProfile("sequential", tree.paths))


def test_more_candidates_than_there_are_ids_are_refused():
    BRANCHED.check_fits(4, 2**18)
    with pytest.raises(ProfileError, match=r"5 heads of 262144 candidates each have 1310720 candidates, expected at"):
        BRANCHED.check_fits(5, 2**18)


def test_the_plain_tree_is_only_a_root():
    plain = TreeProfile.plain()
    assert (plain.name, plain.size, plain.depth, plain.max_rank, plain.chain_length) == ("plain", 1, 0, -1, 0)
    assert plain.children == ((),)
    np.testing.assert_array_equal(plain.mask, [[True]])
    np.testing.assert_array_equal(plain.candidate_ids(10), [0])
    for array in (plain.parents, plain.heads, plain.ranks):
        np.testing.assert_array_equal(array, [-1])
    plain.check_fits(heads=0, top_k=0)


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_agree_with_a_recomputation_from_parents(seed):
    rng = np.random.default_rng(seed)
    candidates = int(rng.integers(1, 80))
    profile = random_profile(rng, candidates)
    assert profile.size == candidates + 1
    assert all(profile.parents[node] < node for node in range(profile.size))

    for node in range(profile.size):
        lineage, ancestor = [], node
        while ancestor != -1:
            lineage.append(ancestor)
            ancestor = int(profile.parents[ancestor])
        np.testing.assert_array_equal(np.flatnonzero(profile.mask[node]), sorted(lineage))
        assert profile.depths[node] == len(lineage) - 1
        assert profile.heads[node] == len(lineage) - 2
        path = tuple(int(profile.ranks[i]) for i in reversed(lineage[:-1]))
        assert path == ((), *profile.paths)[node]
        assert all(profile.parents[child] == node for child in profile.children[node])
    assert sorted(sum(profile.children, ())) == list(range(1, profile.size))
    chain = profile.chain_length
    np.testing.assert_array_equal(profile.parents[1 : chain + 1], range(chain))
    np.testing.assert_array_equal(profile.ranks[1 : chain + 1], 0)
    assert (0,) * (chain + 1) not in profile.paths


@pytest.mark.parametrize("name", ["parents", "depths", "heads", "ranks", "mask"])
@pytest.mark.parametrize("duplicate", [lambda tree: tree, copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_arrays_are_cached_typed_and_read_only(name, duplicate):
    assert getattr(BRANCHED, name) is getattr(BRANCHED, name)
    array = getattr(duplicate(BRANCHED), name)
    assert array.dtype == (np.bool_ if name == "mask" else np.int32)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_profiles_are_values():
    same = TreeProfile("branched", [list(path) for path in reversed(BRANCHED.paths)])
    assert same == BRANCHED
    assert hash(same) == hash(BRANCHED)
    assert copy.deepcopy(BRANCHED) == BRANCHED
    assert dataclasses.replace(BRANCHED, name="other") != BRANCHED
    assert dataclasses.replace(BRANCHED, source="elsewhere") != BRANCHED
    with pytest.raises(dataclasses.FrozenInstanceError):
        BRANCHED.name = "other"


def test_numpy_ranks_become_plain_integers():
    profile = TreeProfile("numpy", ((np.int64(0),), (np.uint8(0), np.int32(3))))
    assert profile.paths == ((0,), (0, 3))
    assert all(type(rank) is int for path in profile.paths for rank in path)


def test_require_accepts_what_just_fits():
    BRANCHED.check_fits(heads=3, top_k=3)


@pytest.mark.parametrize(
    ("heads", "top_k", "message"),
    [
        (3, 10, "tree 'x' has a path of depth 4 ([0, 0, 0, 0]) but the bundle has 3 heads"),
        (1, 10, "tree 'x' has a path of depth 2 ([0, 0]) but the bundle has 1 head"),
        (4, 7, "tree 'x' has a path with rank 7 ([7]) but the bundle keeps the top 7 of each head (ranks start at 0)"),
    ],
)
def test_require_names_tree_path_and_what_the_bundle_has(heads, top_k, message):
    profile = TreeProfile("x", ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (7,)))
    with pytest.raises(ProfileError) as caught:
        profile.check_fits(heads, top_k)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], "tree 'x': path [1, 0] has no parent, add [1]"),
        ([[0], [0, 0, 0]], "tree 'x': path [0, 0, 0] has no parent, add [0, 0]"),
        ([[0], [1], [0]], "tree 'x': path [0] is listed more than once"),
        ([[0], []], "tree 'x': paths[1] is empty; the root is not listed"),
        ([[0], [0, -1]], "tree 'x': paths[1][1] must be a rank from 0 to 4095, got -1"),
        ([[0], [4096]], "tree 'x': paths[1][0] must be a rank from 0 to 4095, got 4096"),
        ([[16**9999]], "tree 'x': paths[0][0] must be a rank from 0 to 4095, got a value too long to show"),
        ([[0], [True]], "tree 'x': paths[1][0] must be an integer, got bool True"),
        ([[0.0]], "tree 'x': paths[0][0] must be an integer, got float 0.0"),
        ([["0"]], "tree 'x': paths[0][0] must be an integer, got str '0'"),
        ([[0], 1], "tree 'x': paths[1] must be a list of ranks, got int 1"),
        (["00"], "tree 'x': paths[0] must be a list of ranks, got str '00'"),
        ("00", "tree 'x': paths must be a list of lists of ranks, got str '00'"),
        (None, "tree 'x': paths must be a list of lists of ranks, got NoneType None"),
        ([[i] for i in range(1024)], "tree 'x' has 1025 nodes, root included; at most 1024 are allowed"),
    ],
)
def test_malformed_paths_are_refused(paths, message):
    with pytest.raises(ProfileError) as caught:
        TreeProfile("x", paths)
    assert str(caught.value) == message


def test_the_largest_legal_trees():
    wide = TreeProfile("wide", tuple((rank,) for rank in range(3073, 4096)))
    deep = TreeProfile("deep", tuple((0,) * depth for depth in range(1, 1024)))
    assert (wide.size, wide.max_rank) == (1024, 4095)
    assert (deep.size, deep.depth, deep.chain_length) == (1024, 1023, 1023)
    np.testing.assert_array_equal(deep.mask, np.tri(1024, dtype=bool))


@pytest.mark.parametrize("name", ["a", "0", "mc_sim_7b_63", "tree-8.v2", "x" * 64])
def test_names_that_are_allowed(name):
    assert TreeProfile(name, ()).name == name


@pytest.mark.parametrize(
    "name", ["", "Tree", "-a", ".a", "_a", "a/b", "a\\b", "../a", "a b", "a\n", "ä", "x" * 65, "nul\0"]
)
def test_names_that_are_not_allowed(name):
    with pytest.raises(ProfileError, match=r"^tree name .* is not allowed: use 1 to 64 lower-case letters"):
        TreeProfile(name, ())


def test_name_and_source_must_be_text():
    with pytest.raises(ProfileError, match=r"^a tree's name must be a string, got int 3$"):
        TreeProfile(3, ())
    with pytest.raises(ProfileError, match=r"^tree 'x': source must be a string, got list \[\]$"):
        TreeProfile("x", (), [])
    for source in ("two\nlines", "\x1b[31m", "\ud800"):
        with pytest.raises(ProfileError, match=r"^tree 'x': source must be one line of printable text"):
            TreeProfile("x", (), source)
