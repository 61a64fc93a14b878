"""A build records what its validation found, and writes no bundle if a graph differs from the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from medusa_exporter.build import build
from medusa_exporter.graph import variants
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.graph_runner import GraphRunner, StepResult
from medusa_exporter.validation.steps import RecordedStep
from medusa_runtime.bundle import Bundle


def test_the_manifest_keeps_the_differences(tiny_precisions: Path) -> None:
    checks = Bundle.open(tiny_precisions).manifest.graph_checks
    assert sorted(checks) == [f"graphs/ort-cpu-{precision}.onnx" for precision in ("fp32", "int4", "int8", "w8a8")]
    assert all(check.steps == ("prefill", "plain", "tree", "rope", "draft") for check in checks.values())
    fp32, *others = (checks[f"graphs/ort-cpu-{precision}.onnx"].differs_by for precision in ("fp32", "int8", "int4"))
    assert 0 < fp32 < 1e-5 < min(others)


def test_no_bundle_appears_where_a_graph_is_another_model(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = variants.make_graphs

    def faulty(*arguments: object) -> object:
        graphs, sizes = made(*arguments)
        table = graphs["graphs/ort-cpu-fp32.onnx"].graph.initializers["in_place.sin"]
        table.const_value = ir.tensor(np.negative(table.const_value.numpy()))
        return graphs, sizes

    monkeypatch.setattr(variants, "make_graphs", faulty)
    with pytest.raises(
        GraphMismatchError, match=r"ort-cpu-fp32\.onnx differs from the model: .* keys of layer 0 differ"
    ):
        build(str(tiny_model), str(tiny_heads), tmp_path / "bundle", profiles=("tree-4",))
    assert list(tmp_path.iterdir()) == []


def test_graphs_for_several_sequences_are_checked_in_all_of_them(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run = GraphRunner.step

    def counted(runner: GraphRunner, step: RecordedStep) -> list[StepResult]:
        found = run(runner, step)
        seen.append(len(found))
        return found

    monkeypatch.setattr(GraphRunner, "step", counted)
    only = {"backends": ("tensorrt",), "precisions": ("fp32",), "profiles": ("tree-4",)}
    checks = build(str(tiny_model), str(tiny_heads), tmp_path / "bundle", batch=2, **only).manifest.graph_checks
    assert set(seen) == {2}
    names = ["plain-b2", "prefill-b2", "t4-b2"]
    assert sorted(checks) == [f"graphs/tensorrt-fp32-{name}.onnx" for name in names]
    assert [name for name in names if checks[f"graphs/tensorrt-fp32-{name}.onnx"].steps] == names[1:]
