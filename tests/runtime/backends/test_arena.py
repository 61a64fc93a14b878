"""Runs of kept rows, and where they go."""

from __future__ import annotations

import numpy as np
import pytest
from medusa_runtime.backends.arena import RowArena, runs
from medusa_runtime.facts import ModelFacts

from .host_device import HostDevice

MODEL = ModelFacts("m", "llama", 2, 8, 2, 1, 4, 16, 64, ())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([0], [(0, 0, 1)]),
        ([0, 1, 2], [(0, 0, 3)]),
        ([0, 2, 3, 7], [(0, 0, 1), (1, 2, 2), (3, 7, 1)]),
        (range(5), [(0, 0, 5)]),
        ([], []),
    ],
)
def test_runs(path: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(path)) == expected


def test_kept_rows_lie_behind_the_past_of_their_sequence_in_every_tensor() -> None:
    device = HostDevice()
    arena = RowArena(device, MODEL, 4, batch=2, capacity=6, nodes=4)
    past = arena._past.array.view(np.float32).reshape(4, 2, 6, 4)
    new = arena._new.array.view(np.float32)
    new[:] = np.arange(new.size)
    rows = new[: 4 * 2 * 3 * 4].reshape(4, 2, 3, 4)  # a step of three nodes, one less than there is room for
    arena.commit(1, [0, 2], 3, nodes=3)
    np.testing.assert_array_equal(past[:, 1, 3], rows[:, 1, 0])
    np.testing.assert_array_equal(past[:, 1, 4], rows[:, 1, 2])
    assert not past[:, 0].any() and not past[:, 1, :3].any() and not past[:, 1, 5].any()
    assert device.copies == [(16, 4), (16, 4)]
    with pytest.raises(RuntimeError, match=r"5 \+ 2 rows do not fit an arena of 6"):
        arena.commit(0, [0, 1], 5, nodes=3)


def test_a_larger_arena_takes_all_rows_over() -> None:
    device = HostDevice()
    small = RowArena(device, MODEL, 4, batch=2, capacity=3, nodes=1)
    small._past.array.view(np.float32)[:] = np.arange(4 * 2 * 3 * 4)
    large = RowArena(device, MODEL, 4, batch=2, capacity=5, nodes=1)
    large.take_over(small)
    before = small._past.array.view(np.float32).reshape(4, 2, 3, 4)
    after = large._past.array.view(np.float32).reshape(4, 2, 5, 4)
    np.testing.assert_array_equal(after[:, :, :3], before)
    assert not after[:, :, 3:].any()
