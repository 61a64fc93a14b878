"""The best tree of every size, and what the other half of the answers says of it."""

from __future__ import annotations

import numpy as np
from medusa_exporter.calibration.tree_search import search_trees, with_source
from medusa_profiles.catalogue import load_profile
from medusa_profiles.simulation import tokens_per_step
from medusa_runtime.profile_choice import expect_all

from ...calibrations import acceptance, calibration

RNG = np.random.default_rng(3)
FIT, CHECK = (RNG.choice([0, 1, 2, -1], p=[0.6, 0.2, 0.1, 0.1], size=(400, 3)) for _ in range(2))


def test_every_measured_size_has_a_tree_that_the_other_half_checks():
    known = acceptance(FIT, CHECK)
    measured = calibration({1: 10.0, 2: 11.0, 4: 13.0, 6: 30.0}, known)
    found = search_trees(measured, known)
    assert [one.profile.name for one in found] == ["best-2", "best-4", "best-6"]
    for one in found:
        assert one.tokens_per_step == tokens_per_step(one.profile, CHECK, np.zeros(400, int))
        assert one.step_ms == measured.step_ms(one.profile.size, 64)
    fitted = [tokens_per_step(one.profile, FIT, np.zeros(400, int)) for one in found]
    for shipped, best in zip(("tree-2", "tree-4", "tree-6"), fitted, strict=True):
        assert tokens_per_step(load_profile(shipped), FIT, np.zeros(400, int)) <= best


def test_in_quantised_precisions_only_chains_are_found():
    known = acceptance(FIT, CHECK)
    found = search_trees(calibration({1: 10.0, 2: 11.0, 4: 13.0, 6: 14.0}, known, graph="ort-cpu-w8a8"), known)
    assert [one.profile.size for one in found] == [2, 4]  # three heads: no chain of six nodes
    assert all(one.profile.is_chain for one in found)


def test_sizes_with_too_few_answers_are_left_out():
    known = acceptance([[0, 0, 0]] * 5)
    found = search_trees(calibration({1: 10.0, 2: 11.0, 4: 12.0, 8: 13.0}, known), known)
    assert [one.profile.size for one in found] == [2, 4]


def test_trees_of_the_bundle_are_measured_on_the_same_half():
    known = acceptance(FIT, CHECK)
    trees = [load_profile(name) for name in ("tree-2", "tree-16")]
    (found,) = expect_all(calibration({1: 10.0, 4: 12.0}, known), trees, check=True)
    assert found.tokens_per_step == tokens_per_step(trees[0], CHECK, np.zeros(400, int))


def test_the_source_says_what_to_expect():
    known = acceptance([[0]] * 4, past=123.4)
    measured = calibration({1: 10.0, 2: 12.0}, known)
    tree = with_source(search_trees(measured, known)[0], measured, known, "tiny")
    assert tree.source == (
        "found by search-tree for tiny, ort-cpu-fp32: 2.00 tokens/step, overhead 1.19, speed-up 1.68 expected on "
        "paper, 2 threads, past of 123 tokens"
    )
