"""Tree decoding draws answers with the exact joint distribution, and the tokens of plain decoding for the same seed."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.answer_rule import SampleRule
from medusa_runtime.sampling import Sampler
from medusa_runtime.sampling_params import SamplingParams

from .reference import joint_distribution
from .scripted import ScriptedModel, ScriptedRows, plain_answer
from .statistic import assert_distribution

LENGTH, PROMPT, ENDS = 3, (1, 6, 6), (5,)
MODEL = ScriptedModel()
TREE = TreeProfile("bushy", ((0,), (0, 0), (0, 0, 0), (0, 1), (1,), (1, 0), (2,), (2, 0), (2, 0, 0)))
PLAIN = TreeProfile.plain()
CASES = {
    "no filter": SamplingParams(temperature=1.2),
    "filters": SamplingParams(temperature=0.8, top_k=5, top_p=0.9),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.5, min_tokens=2),
}


class Trees:
    """Steps over a tree of random candidates behind some tokens; `duplicates` counts siblings that hold one token."""

    def __init__(self, variants=4):
        self.variants, self.made, self.duplicates = variants, {}, 0

    def behind(self, tokens, number):
        """(tokens of the nodes, rows) of one of the trees behind `tokens`, whose last one is the root."""
        key = (tuple(tokens), number % self.variants)
        if key not in self.made:
            rng = np.random.default_rng([len(tokens), *tokens, key[1]])
            # Half of the nodes hold likely tokens, so that many paths are accepted; siblings may hold the same one.
            nodes, paths = [int(tokens[-1])], [list(tokens)]
            for node in range(1, TREE.size):
                before = paths[int(TREE.parents[node])]
                likely = int(MODEL.logits(before).argmax())
                nodes.append(likely if rng.random() < 0.5 else int(rng.integers(MODEL.vocab_size)))
                paths.append([*before, nodes[-1]])
            for children in TREE.children:
                held = [nodes[child] for child in children]
                self.duplicates += len(held) - len(set(held))
            self.made[key] = nodes, ScriptedRows([MODEL.logits(path) for path in paths])
        return self.made[key]


def tree_answer(sampler, trees, number):
    """The first tokens of an answer, and how many steps they took behind the first token."""
    answer, steps = [], 0
    rule = SampleRule(sampler, answer)
    first = ScriptedRows([MODEL.logits(PROMPT)])
    answer.append(rule(PLAIN, [PROMPT[-1]], [0], first)[1])
    while len(answer) < LENGTH:
        nodes, rows = trees.behind([*PROMPT, *answer], number)
        path, token = rule(TREE, nodes, [0] * TREE.size, rows)
        answer += [nodes[node] for node in path[1:]] + [token]
        steps += 1
    return answer[:LENGTH], steps


@pytest.mark.parametrize("draws", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_tree_decoding_has_the_exact_joint_distribution(name, draws):
    params, trees, steps = CASES[name], Trees(), 0
    counts = np.zeros((MODEL.vocab_size,) * LENGTH)
    for draw in range(draws):
        sampler = Sampler(params, PROMPT, MODEL.vocab_size, ENDS, (), seed=draw // 4, choice=draw % 4)
        answer, taken = tree_answer(sampler, trees, draw)
        counts[tuple(answer)] += 1
        steps += taken
    assert trees.duplicates > 20 and steps < 1.8 * draws  # trees with duplicates, and paths that were accepted
    assert_distribution(counts, joint_distribution(params, MODEL, PROMPT, LENGTH, ENDS, ()))


def test_the_same_seed_gives_the_tokens_of_plain_decoding():
    trees = Trees()
    for params in CASES.values():
        for seed in range(300):
            sampler = Sampler(params, PROMPT, MODEL.vocab_size, ENDS, (), seed, 0)
            expected = plain_answer(sampler, MODEL, PROMPT, LENGTH)
            assert tree_answer(sampler, trees, seed)[0] == expected
