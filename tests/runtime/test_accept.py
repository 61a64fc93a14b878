import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import ACCEPT_RULES, Typical, greedy, log_softmax
from medusa_runtime.errors import ArgumentError, MedusaError

from .fake_backend import random_tree

SEEDS = range(40)
V = 6


class Rows:
    """RowReader that remember which rows were asked for."""

    def __init__(self, logits):
        self.logits, self.read = np.asarray(logits, dtype=np.float32), []

    def __call__(self, row, /):
        self.read.append(row)
        return self.logits[row]


def case(seed, spread=2.0):
    """A random tree, a token for every node (siblings differ, as a head's candidates do), and random logits."""
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, int(rng.integers(0, 20)), ranks=4)
    tokens = np.zeros(tree.size, dtype=np.int32)
    tokens[0] = rng.integers(V)
    for children in tree.children:
        tokens[list(children)] = rng.permutation(V)[: len(children)]
    logits = rng.normal(scale=spread, size=(tree.size, V)).astype(np.float32)
    return tree, tokens, logits


def all_paths(tree):
    """Every path from the root to every node."""
    for node in range(tree.size):
        path = [node]
        while path[0]:
            path.insert(0, int(tree.parents[path[0]]))
        yield path


def softmax(row, temperature=1.0):
    weights = [math.exp((float(x) - float(max(row))) / temperature) for x in row]
    return [weight / sum(weights) for weight in weights]


def literal_typical(tree, tokens, logits, epsilon, delta, temperature):
    """The paper's rule over all paths: the longest whose every token passes, the likelier among equals."""
    best = (0, 0.0, [])
    for path in all_paths(tree):
        log_probability = 0.0
        for parent, child in pairwise(path):
            p = softmax(logits[parent], temperature)
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            if not p[tokens[child]] > min(epsilon, delta * math.exp(-entropy)):
                break
            log_probability += math.log(p[tokens[child]])
        else:
            best = max(best, (len(path), log_probability, path))
    return best[2], int(logits[best[2][-1]].argmax())


def test_rules_have_names():
    assert [ACCEPT_RULES["greedy"], ACCEPT_RULES["typical"]] == [greedy, Typical()]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_keeps_the_longest_path_of_the_decoders_own_tokens(seed):
    tree, tokens, logits = case(seed)
    argmax = logits.argmax(-1).astype(np.int32)
    agreed = [p for p in all_paths(tree) if all(tokens[b] == argmax[a] for a, b in pairwise(p))]
    path = max(agreed, key=len)
    rows = Rows(logits)
    assert greedy(tree, tokens, argmax, rows) == (path, argmax[path[-1]])
    assert greedy(tree, tokens, argmax) == (path, argmax[path[-1]])
    assert rows.read == []


def test_greedy_goes_on_along_any_branch():
    tree = TreeProfile("t", ((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)))  # parents 0 1 0 3 3 5
    tokens = np.array([9, 1, 2, 3, 4, 5, 6], dtype=np.int32)
    argmax = np.array([3, 0, 0, 5, 0, 6, 7], dtype=np.int32)
    assert greedy(tree, tokens, argmax) == ([0, 3, 5, 6], 7)
    assert greedy(tree, tokens, np.array([3, 0, 0, 8, 0, 6, 7], dtype=np.int32)) == ([0, 3], 8)
    assert greedy(tree, tokens, np.array([8, 2, 0, 5, 0, 6, 7], dtype=np.int32)) == ([0], 8)


@pytest.mark.parametrize("rule", [greedy, Typical()])
def test_the_root_alone_is_kept_and_followed_by_the_decoders_token(rule):
    rows = Rows([[0, 0, 5, 0]])
    assert rule(TreeProfile.plain(), np.array([3], np.int32), np.array([2], np.int32), rows) == ([0], 2)
    assert rows.read == []


@pytest.mark.parametrize(("epsilon", "delta", "temperature"), [(0.09, 0.3, 1.0), (0.3, 0.9, 0.7), (0.02, 0.1, 1.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_typical_is_the_papers_rule(seed, epsilon, delta, temperature):
    tree, tokens, logits = case(seed)
    argmax = logits.argmax(-1).astype(np.int32)
    expected = literal_typical(tree, tokens, logits, epsilon, delta, temperature)
    found = Typical(epsilon=epsilon, delta=delta, temperature=temperature)(tree, tokens, argmax, Rows(logits))
    assert found == expected


def test_typical_by_default_takes_the_papers_numbers():
    for seed in SEEDS:
        tree, tokens, logits = case(seed)
        argmax = logits.argmax(-1).astype(np.int32)
        assert Typical()(tree, tokens, argmax, Rows(logits)) == literal_typical(tree, tokens, logits, 0.09, 0.3, 1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_typical_reads_each_row_that_a_path_reaches_once_and_no_other(seed):
    tree, tokens, logits = case(seed)
    rows = Rows(logits)
    Typical()(tree, tokens, logits.argmax(-1).astype(np.int32), rows)
    reached = {
        path[-1]
        for path in all_paths(tree)
        if all(
            (p := softmax(logits[a]))[tokens[b]] > min(0.09, 0.3 * math.exp(sum(x * math.log(x) for x in p)))
            for a, b in pairwise(path)
        )
    }
    assert sorted(rows.read) == sorted(node for node in reached if tree.children[node])


def test_typical_reads_what_the_paper_says_of_one_step():
    tree = TreeProfile("t", ((0,), (1,)))
    tokens = np.array([0, 1, 2], dtype=np.int32)

    def kept(probabilities):
        rows = Rows(np.log(np.array([probabilities] * 3)))
        return Typical()(tree, tokens, np.zeros(3, np.int32), rows)[0]

    assert kept([0.85, 0.10, 0.05]) == [0, 1]  # 0.10 > 0.09, and delta * exp(-H) is larger still
    assert kept([0.87, 0.08, 0.05]) == [0]
    assert kept([0.85, 0.05, 0.10]) == [0, 2]
    flat = [0.16] * 5 + [0.2]  # H = 1.787, delta * exp(-H) = 0.050: a flat distribution lets less likely tokens pass
    assert kept(flat) == [0, 1]
    tail = 0.5 / 20
    assert kept([0.39, 0.06, 0.05, *[tail] * 20]) == [0, 1]  # H = 2.5: 0.024 is enough


def test_a_longer_typical_path_wins_over_a_likelier_one():
    tree = TreeProfile("t", ((0,), (1,), (1, 0)))
    tokens = np.array([0, 1, 2, 0], dtype=np.int32)
    rows = Rows(np.log([[0.1, 0.7, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.8, 0.1, 0.1]]))
    assert Typical()(tree, tokens, np.array([1, 2, 2, 0], np.int32), rows) == ([0, 2, 3], 0)


def test_among_equal_typical_paths_the_first_wins():
    tree = TreeProfile("t", ((0,), (1,), (2,), (0, 0), (1, 0), (2, 0)))
    tokens = np.array([0, 1, 0, 2, 3, 0, 3], dtype=np.int32)
    assert Typical()(tree, tokens, np.zeros(7, np.int32), Rows(np.zeros((7, 4)))) == ([0, 1, 2], 0)


def test_equality_with_the_threshold_does_not_pass():
    tree = TreeProfile("t", ((0,),))
    row = Rows(np.zeros((2, 2)))  # p = 0.5 exactly
    tokens, argmax = np.array([0, 1], np.int32), np.zeros(2, np.int32)
    assert Typical(epsilon=0.5, delta=10.0)(tree, tokens, argmax, row) == ([0], 0)
    assert Typical(epsilon=0.4999, delta=10.0)(tree, tokens, argmax, row) == ([0, 1], 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_epsilon_of_a_half_or_more_typical_keeps_a_part_of_what_greedy_keeps(seed):
    """Only a token likelier than one half passes where min() is at least one half, and that one is the argmax."""
    tree, tokens, logits = case(seed, spread=6.0)
    argmax = logits.argmax(-1).astype(np.int32)
    path, following = Typical(epsilon=0.5, delta=1e9)(tree, tokens, argmax, Rows(logits))
    assert greedy(tree, tokens, argmax)[0][: len(path)] == path
    assert following == argmax[path[-1]]


@pytest.mark.parametrize("seed", SEEDS)
def test_near_temperature_zero_typical_is_greedy(seed):
    """Where no two logits are equal the distribution has one token left, of probability 1."""
    tree, tokens, logits = case(seed)
    argmax = logits.argmax(-1).astype(np.int32)
    assert Typical(temperature=1e-6)(tree, tokens, argmax, Rows(logits)) == greedy(tree, tokens, argmax)


def test_tokens_ruled_out_by_the_model_do_no_harm():
    tree = TreeProfile("t", ((0,), (1,)))
    tokens, argmax = np.array([0, 1, 2], np.int32), np.array([2, 0, 0], np.int32)
    row = [-np.inf, -np.inf, 4.0, 3.0]
    assert Typical()(tree, tokens, argmax, Rows([row] * 3)) == ([0, 2], 0)
    assert Typical(epsilon=0.0)(tree, tokens, argmax, Rows([row] * 3)) == ([0, 2], 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": -0.01}, r"^epsilon is -0\.01, expected a probability, from 0 to 1$"),
        ({"epsilon": 1.5}, r"^epsilon is 1\.5, expected a probability"),
        ({"epsilon": math.nan}, r"^epsilon is nan, expected a probability"),
        ({"delta": -0.3}, r"^delta is -0\.3, expected a finite number from 0 up$"),
        ({"delta": math.inf}, r"^delta is inf, expected a finite number"),
        ({"delta": math.nan}, r"^delta is nan, expected a finite number"),
        ({"temperature": 0.0}, r"^temperature is 0\.0, expected a finite number from 1e-06 up; .*'lossless'$"),
        ({"temperature": -1.0}, r"^temperature is -1\.0, expected a finite number"),
        ({"temperature": math.inf}, r"^temperature is inf, expected a finite number"),
        ({"temperature": math.nan}, r"^temperature is nan, expected a finite number"),
    ],
)
def test_parameters_that_make_no_rule_are_refused_before_any_step(wrong, message):
    with pytest.raises(MedusaError, match=message):
        Typical(**wrong)


def test_parameters_may_lie_at_their_limits():
    tree, tokens, logits = case(0)
    argmax = logits.argmax(-1).astype(np.int32)
    for rule in (Typical(epsilon=0, delta=0), Typical(epsilon=1), Typical(temperature=1e-6), Typical(temperature=1e9)):
        path, following = rule(tree, tokens, argmax, Rows(logits))
        assert path[0] == 0 and following == argmax[path[-1]]


def test_log_softmax_of_large_logits():
    row = np.array([1e4, 1e4, -1e4, 0], dtype=np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(row)), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("name", ["epsilon", "delta", "temperature"])
def test_thresholds_are_kept_as_the_numbers_that_were_checked(name):
    """Python compares whole numbers and fractions that the arithmetic of the rule cannot convert."""
    for huge in (10**400, -(10**400), 10**5000, -(10**5000), Fraction(10**5000), [10**5000]):
        with pytest.raises(ArgumentError, match=f"{name} is") as found:
            Typical(**{name: huge})
        assert len(str(found.value)) < 300
    for value in (1, Fraction(1, 2), np.float32(0.5), np.int8(1)):
        rule = Typical(**{name: value})
        assert type(getattr(rule, name)) is float and getattr(rule, name) == value
        assert rule == Typical(**{name: float(value)})


@pytest.mark.parametrize("wrong", [{"epsilon": "0.1"}, {"delta": None}, {"temperature": True}], ids=str)
def test_thresholds_of_other_types_are_refused_in_words(wrong):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=rf"{name} is .*of type .*expected a number"):
        Typical(**wrong)


def test_the_walk_follows_all_nodes_that_hold_the_token():
    """Nodes 1 and 3 hold the same token; only behind the second one does the path go on."""
    tree = TreeProfile("twice", ((0,), (0, 0), (1,), (1, 0), (1, 0, 0)))
    tokens = [5, 7, 1, 7, 8, 9]  # node 1 and node 3 hold 7; 8 is behind node 3 only
    argmax = [7, 8, 0, 8, 9, 4]
    assert greedy(tree, tokens, argmax) == ([0, 3, 4, 5], 4)
    tokens[2], argmax[2] = 8, 9  # now 8 is behind both, and only behind the second one 9 follows
    assert greedy(tree, tokens, argmax) == ([0, 3, 4, 5], 4)
    argmax[2] = argmax[4] = 3
    assert greedy(tree, tokens, argmax) == ([0, 1, 2], 3)
