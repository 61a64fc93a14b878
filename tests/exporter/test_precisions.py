"""Which tree a precision takes where none is named."""

from __future__ import annotations

import pytest
from medusa_exporter.precisions import BEST_NODES, PRECISIONS, default_profile
from medusa_profiles import catalogue
from medusa_profiles.profile import TreeProfile

SHIPPED = [catalogue.load(name) for name in catalogue.names()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_the_shipped_trees_the_fitted_one(precision: str) -> None:
    nodes = BEST_NODES[precision]
    assert default_profile(precision, SHIPPED) == ("plain" if nodes == 1 else f"tree-{nodes}")


def test_of_others_the_largest_that_is_small_enough() -> None:
    chains = [tree for tree in SHIPPED if tree.name in ("chain-1", "chain-2", "mc_sim_7b_63")]
    assert default_profile("fp32", chains) == "chain-2"


def test_plain_decoding_where_all_are_too_large() -> None:
    assert default_profile("int8", [catalogue.load("mc_sim_7b_63")]) == "plain"
    assert default_profile("fp32", [TreeProfile("six", ((0,), (1,), (2,), (3,), (4,), (5,)))]) == "plain"
