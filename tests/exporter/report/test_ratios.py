"""Ratios: within a backend, between backends, between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.report.ratios import ReportData
from medusa_exporter.report.runs import read_runs

from .factories import content, written


def page(folder: Path, *contents: dict[str, Any]) -> ReportData:
    return ReportData(read_runs([written(folder / f"{number}.json", one) for number, one in enumerate(contents)]))


def test_backends_of_one_run(tmp_path: Path) -> None:
    found = page(tmp_path, content({"ort-cuda": 2.0, "tensorrt": 1.0}))
    first, second = found.best_trees()
    assert [found.label(one.series) for one in (first, second)] == ["ort-cuda fp16", "tensorrt fp16"]
    assert first.tree.profile == second.tree.profile == "chain-2"  # 2.5 times, the pair 1.6 times
    assert (first.speedup.median, first.speedup.cases) == (pytest.approx(2.5), 2)
    assert first.over_best_plain is not None
    assert second.over_best_plain is not None
    assert (first.over_best_plain.median, second.over_best_plain.median) == pytest.approx((1.25, 2.5))
    assert not first.across_runs
    (pair,) = found.backend_ratios()
    assert (pair.backend[1], pair.first[1], pair.same_run, pair.same_device) == ("tensorrt", "ort-cuda", True, True)
    assert pair.plain is not None
    assert pair.trees is not None
    assert (pair.plain.median, pair.trees.median) == pytest.approx((2.0, 2.0))


def test_ratios_between_two_runs_are_marked(tmp_path: Path) -> None:
    found = page(tmp_path, content({"ort-cuda": 2.0}), content({"tensorrt": 1.0}, (400, 900)))
    first, second = found.best_trees()
    assert found.label(first.series) == "A: ort-cuda fp16"
    assert (first.across_runs, second.across_runs) == (True, False)
    assert first.over_best_plain is not None
    assert (first.over_best_plain.smallest, first.over_best_plain.largest) == pytest.approx(
        (1.25, 2.5)
    )  # alone in the case of 100
    (pair,) = found.backend_ratios()
    assert not pair.same_run
    assert pair.plain is not None
    assert pair.plain.cases == 1  # the case that both have
    assert [case.prompt_length for case in found.cases] == [100, 400, 900]


def test_no_backend_is_measured_against_another_device_s_plain_decoding(tmp_path: Path) -> None:
    found = page(tmp_path, content({"ort-cuda": 2.0}), content({"tensorrt": 1.0}, device="RTX 3060"))
    first = found.best_trees()[0]
    assert first.over_best_plain == first.speedup
    assert not first.across_runs
    (pair,) = found.backend_ratios()
    assert not pair.same_device


def test_backends_without_a_common_case_or_tree_are_not_compared(tmp_path: Path) -> None:
    apart = page(tmp_path, content({"ort-cuda": 2.0}, (100,)), content({"tensorrt": 1.0}, (400,)))
    assert apart.backend_ratios() == []
    plain = content({"ort-cuda": 2.0, "tensorrt": 1.0})
    plain["results"] = [one for one in plain["results"] if one["profile"] == "plain"]
    bare = page(tmp_path, plain)
    assert bare.best_trees() == []
    (pair,) = bare.backend_ratios()
    assert pair.trees is None
    assert pair.plain is not None
    series = bare.series[0]
    assert bare.best_tree(series) is None
    assert bare.find(series, bare.cases[0], tree=True) is None
