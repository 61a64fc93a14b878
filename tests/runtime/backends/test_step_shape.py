"""Step shapes: the padded lengths of the past, and which steps are causal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from medusa_runtime.backends.base import literal_step
from medusa_runtime.backends.step_shape import is_causal, padded_past_length, padded_past_lengths


def test_a_past_is_padded_by_doubling() -> None:
    assert [padded_past_length(length) for length in (0, 1, 256, 257, 512, 513)] == [256, 256, 256, 512, 512, 1024]


@pytest.mark.parametrize(
    ("context", "expected"), [(100, (100,)), (256, (256,)), (1000, (256, 512, 1000)), (1024, (256, 512, 1024))]
)
def test_the_last_padded_length_is_the_context(context: int, expected: tuple[int, ...]) -> None:
    assert padded_past_lengths(context) == expected


def test_causal_steps() -> None:
    step = literal_step(np.array([3, 4], np.int32), 0, np.array([1], np.int32))
    one = literal_step(np.array([3], np.int32), 0, np.array([0], np.int32))
    assert is_causal(step) and is_causal(one) and is_causal(replace(one, draft=True))
    assert not is_causal(replace(step, draft=True))
    assert not is_causal(replace(step, tree_mask=np.eye(2, dtype=np.bool_)[None]))
