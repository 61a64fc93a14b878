"""`build --profile auto`: the fastest tree of each graph becomes its default, as measured where the bundle is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from medusa_exporter.build import build
from medusa_exporter.calibration import default_trees, step_times
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import read_calibrations
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BackendError
from medusa_runtime.profile_choice import fastest


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MIN_ROUNDS", 1)
    monkeypatch.setattr(default_trees, "SECONDS", 0.0)
    monkeypatch.setattr(default_trees, "MAX_NEW_TOKENS", 8)


def test_the_fastest_tree_is_the_default(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"profiles": ("auto", "tree-4", "tree-8"), "precisions": ("fp32", "int8"), "report": lines.append}
    result = build(str(tiny_model), str(tiny_heads), tmp_path / "bundle", **options)
    bundle = Bundle.open(tmp_path / "bundle")
    assert result.manifest == bundle.manifest and bundle.manifest.profiles == ("tree-4", "tree-8")
    files = sorted(Path(os.environ["MEDUSA_CACHE"]).rglob("*.json"))
    measured = {one.graph: one for file in files for one in read_calibrations(file)}
    assert measured.keys() == bundle.manifest.graphs.keys() == {"ort-cpu-fp32", "ort-cpu-int8"}
    for key, graph in bundle.manifest.graphs.items():
        assert measured[key].bundle == bundle.manifest.digest
        assert graph.profile == fastest(measured[key], bundle.profiles().values()).profile.name
        assert any(f"{key}: {graph.profile} is the fastest tree" in line for line in lines)
    assert sum("chosen by measuring the machine that builds" in line for line in lines) == 1
    assert Engine.load(tmp_path / "bundle").profile.name == bundle.manifest.graphs["ort-cpu-fp32"].profile
    assert not build(str(tiny_model), str(tiny_heads), tmp_path / "bundle", **options).built


def test_a_graph_that_cannot_run_here_keeps_its_default(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "bundle")

    def fail(*_arguments: object) -> None:
        raise BackendError("no such device")

    monkeypatch.setattr(default_trees, "calibrate_graph", fail)
    lines: list[str] = []
    manifest = default_trees.choose_default_trees(tmp_path / "bundle", lines.append)
    assert manifest.graphs == Bundle.open(tiny_bundle).manifest.graphs
    assert "keeps its default tree, tree-6: it cannot be measured here: no such device" in lines[0]
