"""Sizes that grow by doubling."""

from __future__ import annotations

import pytest
from medusa_runtime.capacity import grow_by_doubling


@pytest.mark.parametrize(("size", "least", "result"), [(256, 1, 256), (256, 256, 256), (256, 257, 512), (3, 25, 48)])
def test_it_doubles_no_more_than_it_must(size: int, least: int, result: int) -> None:
    assert grow_by_doubling(size, least) == result
