"""The check refuses graphs that differ from the contract or cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from medusa_exporter.graph.check import check_saved_graph
from medusa_runtime.bundle import Bundle
from medusa_runtime.facts import HeadFacts, ModelFacts


@pytest.fixture
def graph(tiny_bundle: Path, tmp_path: Path) -> tuple[Path, ModelFacts, HeadFacts]:
    shutil.copytree(tiny_bundle / "graphs", tmp_path / "graphs")
    bundle = Bundle.open(tiny_bundle)
    return tmp_path / "graphs" / "ort-cpu-fp32.onnx", bundle.model, bundle.heads


def test_a_built_graph_passes(graph: tuple[Path, ModelFacts, HeadFacts]) -> None:
    declared = check_saved_graph(*graph)
    assert declared.dtype == "float32" and declared.size is None
    assert [spec.name for spec in declared.inputs[:2]] == ["input_ids", "position_ids"]


def test_a_renamed_output_is_refused(graph: tuple[Path, ModelFacts, HeadFacts]) -> None:
    path, *facts = graph
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["greedy" if name == "argmax" else name for name in node.output]
    model.graph.output[1].name = "greedy"
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match=r"declares .*'greedy'.*expected .*'argmax'"):
        check_saved_graph(path, *facts)


def test_rows_of_another_width_are_refused(graph: tuple[Path, ModelFacts, HeadFacts]) -> None:
    path, *facts = graph
    model = onnx.load(path, load_external_data=False)
    hidden = next(output for output in model.graph.output if output.name == "hidden")
    hidden.type.tensor_type.shape.dim[2].dim_value = 7
    onnx.save(model, path)
    with pytest.raises(Exception, match=r"declares .*'hidden'.*expected .*contract"):
        check_saved_graph(path, *facts)


def test_an_input_of_another_type_is_refused(graph: tuple[Path, ModelFacts, HeadFacts]) -> None:
    path, *facts = graph
    model = onnx.load(path, load_external_data=False)
    given = next(value for value in model.graph.input if value.name == "draft_hidden")
    given.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, path)
    with pytest.raises(Exception, match=r"float16|[Tt]ype"):
        check_saved_graph(path, *facts)


def test_a_truncated_graph_is_refused(graph: tuple[Path, ModelFacts, HeadFacts]) -> None:
    path, *facts = graph
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Exception, match=r"(?i)parse|protobuf|decod"):
        check_saved_graph(path, *facts)
