"""A leak is seen in runs of every length, and crashes are excused of changed graphs alone."""

from __future__ import annotations

import pytest

from .tally import GROWTH, Tally
from .test_bundles import known


@pytest.mark.parametrize("cases", [60, 140, 5000])
def test_a_leak_is_seen(cases: int) -> None:
    tally = Tally("bundles")
    for number in range(cases):
        tally.take({}, {"outcome": "refused", "megabytes": 100.0 + 20.0 * number})
    assert tally.growth > GROWTH
    steady = Tally("bundles")
    for number in range(cases):
        steady.take({}, {"outcome": "refused", "megabytes": 100.0 + number % 7})
    assert steady.growth < 10


def test_only_graphs_may_crash_the_library() -> None:
    crash = {"outcome": "crash"}
    assert known(({"seal": True, "mutations": [["graphs/a.onnx", 1]]}, crash))
    assert not known(({"seal": True, "mutations": [["graphs/a.onnx", 1], ["tokenizer/tokenizer.json", 1]]}, crash))
    assert not known(({"seal": False, "mutations": [["graphs/a.onnx", 1]]}, crash))
    assert not known(({"seal": True, "mutations": [["graphs/a.onnx", 1]]}, {"outcome": "hang"}))
