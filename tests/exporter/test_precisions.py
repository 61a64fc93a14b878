"""Which tree a precision takes where none is named."""

from __future__ import annotations

import re

import pytest
from medusa_exporter.precisions import BEST_NODES, FORMATS, choose_pairs, default_profile
from medusa_profiles import catalogue
from medusa_profiles.profile import TreeProfile
from medusa_runtime.errors import BundleError
from medusa_runtime.profile_choice import QUANTISED

SHIPPED = [catalogue.load_profile(name) for name in catalogue.profile_names()]


def test_the_runtime_knows_which_precisions_are_quantised() -> None:
    assert {precision for precision, weights in FORMATS.items() if weights is not None} == QUANTISED


@pytest.mark.parametrize("precision", FORMATS)
def test_of_the_shipped_trees_the_fitted_one(precision: str) -> None:
    nodes = BEST_NODES[precision]
    assert default_profile("ort-cpu", precision, SHIPPED) == ("plain" if nodes == 1 else f"tree-{nodes}")
    assert default_profile("ort-cuda", "fp16", SHIPPED) == "tree-64"


def test_of_others_the_largest_that_is_small_enough() -> None:
    chains = [tree for tree in SHIPPED if tree.name in ("chain-1", "chain-2", "mc_sim_7b_63")]
    assert default_profile("ort-cpu", "fp32", chains) == "chain-2"


def test_quantised_graphs_get_chains() -> None:
    """Only with chains the tokens are exactly those of plain decoding."""
    branching = TreeProfile("tree-4", ((0,), (1,), (2,)))
    assert default_profile("ort-cpu", "w8a8", [branching]) == "plain"
    assert default_profile("ort-cpu", "w8a8", [branching, catalogue.load_profile("tree-2")]) == "tree-2"
    assert default_profile("ort-cpu", "fp32", [branching]) == "tree-4"


def test_plain_decoding_where_all_are_too_large() -> None:
    assert default_profile("ort-cpu", "int8", [catalogue.load_profile("mc_sim_7b_63")]) == "plain"
    six = TreeProfile("six", ((0,), (1,), (2,), (3,), (4,), (5,)))
    assert default_profile("ort-cpu", "fp32", [six]) == "plain"


def test_each_backend_gets_of_the_precisions_named_those_that_it_runs() -> None:
    assert choose_pairs(["ort-cpu", "tensorrt"], []) == [("ort-cpu", "fp32"), ("tensorrt", "fp16")]
    both = choose_pairs(["ort-cpu", "ort-cuda", "ort-cpu"], ["fp32", "int8", "fp16"])
    assert both == [("ort-cpu", "fp32"), ("ort-cpu", "int8"), ("ort-cuda", "fp16"), ("ort-cuda", "fp32")]


@pytest.mark.parametrize(
    ("backends", "precisions", "message"),
    [
        (["ort-gpu"], [], "unknown backend 'ort-gpu'; expected one of ort-cpu, ort-cuda, tensorrt, tensorrt-rtx"),
        (["tensorrt"], ["int8"], "no precision 'int8' on tensorrt; expected one of fp16, bf16, fp32"),
        (["ort-cpu", "tensorrt"], ["int8"], "tensorrt does not run int8; expected at least one of fp16, bf16, fp32"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(backends: list[str], precisions: list[str], message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)):
        choose_pairs(backends, precisions)
