"""The fastest tree is chosen from what was measured, and the default where the cache has nothing that can be used."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from medusa_profiles.catalogue import load_profile
from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration_cache import calibration_file, machine_of
from medusa_runtime.engine import Engine
from medusa_runtime.errors import ArgumentError, CalibrationError
from medusa_runtime.profile_choice import choose_profile, expect, fastest, find_calibration

from ..calibrations import acceptance, calibration
from .fake_backend import FakeBackend
from .test_calibration_cache import store

ALWAYS_RIGHT = acceptance([[0, 0, 0, 0, 0]] * 10)
TREES = [load_profile(name) for name in ("tree-2", "tree-4", "tree-8")]


def test_expectations_are_those_of_decoding_the_answers():
    found = expect(calibration({1: 10.0, 2: 12.0}), acceptance([[0], [1], [0], [0]]), TREES[0])
    assert (found.tokens_per_step, found.step_ms, found.overhead) == (2.0, 12.0, 1.2)
    assert found.speedup == pytest.approx(2 / 1.2)


def test_what_cannot_be_known_is_none():
    deep = TreeProfile("deep", ((0,), (0, 0)))
    assert expect(calibration({1: 10.0, 4: 12.0}), acceptance([[0]]), deep) is None
    assert expect(calibration({1: 10.0, 2: 12.0}), acceptance([[0, 0]]), deep) is None
    assert fastest(calibration(), TREES) is None


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({1: 10.0, 8: 11.0}, "tree-8"),
        ({1: 10.0, 2: 11.0, 4: 12.0, 8: 60.0}, "tree-4"),
        ({1: 10.0, 2: 40.0, 8: 90.0}, "plain"),
    ],
)
def test_the_most_tokens_per_millisecond_win(times, name):
    assert fastest(calibration(times, ALWAYS_RIGHT), TREES).profile.name == name


@pytest.mark.parametrize(("graph", "name"), [("ort-cpu-fp32", "tree-8"), ("ort-cpu-int8", "tree-4")])
def test_in_quantised_precisions_only_chains_are_chosen(graph, name):
    """The tree of 4 nodes is a chain, that of 8 has branches, and decodes faster here."""
    assert [tree.is_chain for tree in TREES] == [True, True, False]
    assert fastest(calibration({1: 10.0, 8: 11.0}, ALWAYS_RIGHT, graph=graph), TREES).profile.name == name


@pytest.fixture
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


def chosen(bundle, file=None):
    graph = bundle.graph("ort-cpu")[0]
    return choose_profile(bundle, graph, find_calibration(bundle, graph, FakeBackend(), file)).name


def measured(opened, **changes):
    facts = {"bundle": opened.manifest.digest, "machine": machine_of(FakeBackend())} | changes
    return calibration({1: 10.0, 2: 11.0, 4: 12.0, 8: 60.0}, ALWAYS_RIGHT, **facts)


def test_the_cache_decides_and_the_bundle_where_it_has_nothing(bundle, caplog):
    assert chosen(bundle) == "tree-6"
    store(measured(bundle))
    assert chosen(bundle) == "tree-4"
    assert not caplog.records


def test_step_times_alone_decide_nothing(bundle, caplog):
    store(replace(measured(bundle), acceptance=None))
    assert chosen(bundle) == "tree-6"
    assert not caplog.records


@pytest.mark.parametrize("damage", ["text", "outdated", "folder", "other graph", "other bundle"])
def test_a_calibration_that_cannot_be_used_is_only_a_warning(bundle, caplog, damage):
    one = measured(bundle)
    file = calibration_file(one.bundle, one.graph, one.machine)
    if damage == "folder":
        file.mkdir(parents=True)
    else:
        machine = replace(one.machine, library="fake 0.1")
        changes = {
            "outdated": {"machine": machine},
            "other graph": {"graph": "x"},
            "other bundle": {"bundle": "b" * 64},
        }
        store(measured(bundle, **changes.get(damage, {})), file)
    if damage == "text":
        file.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert chosen(bundle) == "tree-6"
    (record,) = caplog.records
    assert record.name == "medusa_runtime" and "measure again: medusa-export calibrate BUNDLE" in record.getMessage()
    assert record.getMessage().endswith("until then the bundle's default tree is used, tree-6")


def test_a_file_comes_before_the_cache_and_has_to_be_right(bundle, tmp_path):
    store(measured(bundle))
    other = replace(measured(bundle).machine, device="another machine")
    eight = calibration({1: 10.0, 8: 11.0}, ALWAYS_RIGHT, bundle=bundle.manifest.digest, machine=other)
    assert chosen(bundle, store(eight, tmp_path / "c.json")) == "chain-4"
    with pytest.raises(CalibrationError, match="cannot be read"):
        chosen(bundle, tmp_path / "none.json")
    with pytest.raises(CalibrationError, match="is of the bundle with the digest"):
        chosen(bundle, store(calibration(), tmp_path / "c.json"))


def test_the_engine_decodes_with_the_chosen_tree(tiny_bundle, bundle, tmp_path):
    assert Engine.load(tiny_bundle, threads=1).profile.name == "tree-6"
    backend = Engine.load(tiny_bundle, threads=1)._decoder.backend
    assert machine_of(backend).threads == 1
    store(measured(bundle, machine=machine_of(backend)))
    assert Engine.load(tiny_bundle, threads=1).profile.name == "tree-4"
    assert Engine.load(tiny_bundle, threads=2).profile.name == "tree-6"
    assert Engine.load(tiny_bundle, threads=1, profile="tree-8").profile.name == "tree-8"
    file = store(measured(bundle), tmp_path / "c.json")
    assert Engine.load(tiny_bundle, threads=2, calibration=file).profile.name == "tree-4"
    with pytest.raises(ArgumentError, match="calibration is 3"):
        Engine.load(tiny_bundle, calibration=3)


def test_the_engine_takes_a_tree_of_ones_own(tiny_bundle):
    own = TreeProfile("own", ((0,), (1,)))
    assert Engine.load(tiny_bundle, threads=1, profile=own).profile == own
