"""A walk through a tree that cannot go on ends where it is; the next step finds out whether the answer goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
from medusa_runtime.answer_rule import SampleRule
from medusa_runtime.errors import InvalidLogitsError, RequestError

TREE: Any = SimpleNamespace(children=((1, 3), (2,), (), ()))  # nodes 0 - 1 - 2, and 0 - 3
TOKENS = [5, 6, 7, 8]


def rule(*choices: int | Exception) -> SampleRule:
    """Chooses a token behind so many tokens of the answer, or raises."""

    def choose(rows: Any, row: int, output: list[int]) -> int:
        choice = choices[len(output)]
        if isinstance(choice, Exception):
            raise choice
        return choice

    sampler: Any = SimpleNamespace(choose=choose)
    return SampleRule(sampler, [])


@pytest.mark.parametrize("error", [RequestError("no token"), InvalidLogitsError("NaN")])
def test_an_error_behind_an_accepted_node_ends_the_path_before_it(error: Exception) -> None:
    rows: Any = None
    assert rule(6, 7, 9)(TREE, TOKENS, [], rows) == ([0, 1, 2], 9)
    assert rule(6, 7, error)(TREE, TOKENS, [], rows) == ([0, 1], 7)
    assert rule(6, error)(TREE, TOKENS, [], rows) == ([0], 6)
    assert rule(8, error)(TREE, TOKENS, [], rows) == ([0], 8)
    with pytest.raises(type(error)):
        rule(error)(TREE, TOKENS, [], rows)
