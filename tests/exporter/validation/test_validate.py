"""Every variant of a correct graph passes the comparison with transformers; what was not run is recorded."""

from __future__ import annotations

import pytest
from medusa_exporter.graph.check import SavedGraph
from medusa_exporter.validation import validate_graphs
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.graph_runner import MissingKernelError
from medusa_exporter.validation.limits import FP32
from medusa_exporter.validation.validate import BF16, SIZE_LEFT_OUT

from .conftest import ExportedGraphs

EVERY_STEP = ("prefill", "plain", "tree", "window", "rope", "draft")


@pytest.fixture(scope="module")
def checks(exported: ExportedGraphs):
    lines: list[str] = []
    of = exported
    found = validate_graphs(of.folder, of.files, of.graphs, of.sizes, of.truth, lines.append)
    assert len(lines) == len(found) == len(exported.files)
    for line, file in zip(lines, exported.files, strict=True):
        reason = found[file].not_run
        assert line.endswith(f"not run here: {reason}" if reason else "values compared with the model's")
    return found


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cuda", "tensorrt"])
def test_fp32_is_the_model_to_the_last_bits(checks, backend: str) -> None:
    run = {file: check for file, check in checks.items() if f"{backend}-fp32" in file and not check.not_run}
    assert run
    assert all(check.differs_by < 2e-6 and check.limit == FP32 for check in run.values()), run


def test_each_graph_runs_all_steps_that_it_can(checks) -> None:
    for name in ("ort-cpu-fp32", "ort-cpu-int4", "ort-cuda-fp32", "ort-cuda-fp16", "tensorrt-fp32-t16"):
        assert checks[f"graphs/{name}.onnx"].steps == EVERY_STEP, name
    assert checks["graphs/tensorrt-fp32-prefill.onnx"].steps == EVERY_STEP[:-1]  # which has no heads


def test_what_is_not_run_is_named(checks) -> None:
    assert {file: check.not_run for file, check in checks.items() if check.not_run} == {
        "graphs/ort-cuda-bf16.onnx": BF16,
        "graphs/tensorrt-fp32-plain.onnx": SIZE_LEFT_OUT,
        "graphs/tensorrt-fp32-t8.onnx": SIZE_LEFT_OUT,
    }


def test_fewer_bits_differ_more_and_within_their_limits(checks) -> None:
    fp32, fp16, int8, int4 = (
        checks[f"graphs/{name}.onnx"].differs_by
        for name in ("ort-cpu-fp32", "ort-cuda-fp16", "ort-cpu-int8", "ort-cpu-int4")
    )
    assert fp32 < 1e-5 < fp16 < 0.005 < int8 < int4 < checks["graphs/ort-cpu-int4.onnx"].limit


def test_a_graph_for_the_cpu_that_the_cpu_cannot_load_ends_the_build(
    exported: ExportedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_graph: object, *, packed: bool) -> None:
        raise MissingKernelError("no kernel for Mystery")

    monkeypatch.setitem(validate_graphs.__globals__, "GraphRunner", refuse)
    with pytest.raises(GraphMismatchError, match=r"ort-cpu-fp32\.onnx: .* cannot run it \(no kernel for Mystery\)"):
        validate_graphs(exported.folder, ["graphs/ort-cpu-fp32.onnx"], exported.graphs, {}, exported.truth)
    file = "graphs/ort-cuda-fp16.onnx"
    assert "Mystery" in validate_graphs(exported.folder, [file], exported.graphs, {}, exported.truth)[file].not_run


def test_quantised_graphs_for_the_cpu_are_checked_in_the_kernels_that_serve_them(
    exported: ExportedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def look(graph: SavedGraph, *, packed: bool) -> None:
        seen[graph.path.stem] = packed
        raise GraphMismatchError("seen")

    monkeypatch.setitem(validate_graphs.__globals__, "GraphRunner", look)
    for graph in exported.graphs:
        if graph.backend != "tensorrt" and graph.precision != "bf16":
            with pytest.raises(GraphMismatchError, match="seen"):
                validate_graphs(exported.folder, [graph.file], exported.graphs, {}, exported.truth)
    assert {name for name, packed in seen.items() if packed} == {"ort-cpu-int8", "ort-cpu-w8a8", "ort-cpu-int4"}
    assert {name for name, packed in seen.items() if not packed} == {"ort-cpu-fp32", "ort-cuda-fp32", "ort-cuda-fp16"}
