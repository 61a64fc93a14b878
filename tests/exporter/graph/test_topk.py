"""TopK in two stages returns the same as in one, including the first of equal values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.topk import two_stage_argmax, two_stage_topk
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROWS = 5


def model(length: int, count: int, *, values: bool = False, rows: int | str = ROWS, opset: int = 17) -> ir.Model:
    """A TopK of `count` and an ArgMax over the same rows; `values` makes TopK's values an output too."""
    nodes = [
        helper.make_node("Identity", ["x"], ["rows"]),
        helper.make_node("TopK", ["rows", "count"], ["best", "order"], axis=-1, largest=1, sorted=1),
        helper.make_node("ArgMax", ["rows"], ["argmax"], axis=-1, keepdims=0, select_last_index=0),
    ]
    outputs = [
        helper.make_tensor_value_info("order", TensorProto.INT64, [1, rows, count]),
        helper.make_tensor_value_info("argmax", TensorProto.INT64, [1, rows]),
    ]
    if values:
        outputs.append(helper.make_tensor_value_info("best", TensorProto.FLOAT, [1, rows, count]))
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, length])],
        outputs,
        [numpy_helper.from_array(np.array([count], np.int64), "count")],
        value_info=[helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, rows, length])],
    )
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(made)


def run(graph: ir.Model, rows: NDArray[Any]) -> list[NDArray[Any]]:
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, {"x": rows})
    return found


def kinds(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph if node.op_type in ("TopK", "ArgMax")]


@pytest.mark.parametrize(("length", "count"), [(64, 1), (4096, 10), (250, 6), (49152, 3)])
def test_two_stages_find_the_same(length: int, count: int) -> None:
    rng = np.random.default_rng(length)
    for rows in (
        rng.standard_normal((1, ROWS, length)).astype(np.float32),
        rng.integers(0, 4, (1, ROWS, length)).astype(np.float32),  # most values are equal
    ):
        graph = model(length, count)
        wanted = run(graph, rows)
        two_stage_topk(graph.graph)
        assert kinds(graph) == ["TopK"] * 4
        for found, expected in zip(run(graph, rows), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_prime_length_stays_one_stage() -> None:
    graph = model(257, 3)
    two_stage_topk(graph.graph)
    assert kinds(graph) == ["TopK", "ArgMax"]


def test_a_topk_whose_values_are_used_stays() -> None:
    graph = model(64, 2, values=True)
    two_stage_topk(graph.graph)
    assert kinds(graph) == ["TopK", "TopK", "TopK"]  # the original one, and two in place of ArgMax
    assert run(graph, np.zeros((1, ROWS, 64), np.float32))[2].shape == (1, ROWS, 2)


@pytest.mark.parametrize("length", [64, 250, 49152, 151936])
def test_argmax_over_the_best_part(length: int) -> None:
    rng = np.random.default_rng(length)
    for rows in (
        rng.standard_normal((1, ROWS, length)).astype(np.float32),
        rng.integers(0, 4, (1, ROWS, length)).astype(np.float32),  # most values are equal
        np.zeros((1, ROWS, length), np.float32),
    ):
        graph = model(length, 1, opset=23)
        two_stage_argmax(graph.graph)
        operators = [node.op_type for node in graph.graph]
        assert operators.count("ArgMax") == 2 and operators.count("ReduceMax") == 1
        np.testing.assert_array_equal(run(graph, rows)[1], rows.argmax(-1))


@pytest.mark.parametrize("length", [257, 2 * 257])
def test_argmax_over_a_row_without_parts_stays(length: int) -> None:
    graph = model(length, 1, opset=23)
    two_stage_argmax(graph.graph)
    assert kinds(graph) == ["TopK", "ArgMax"]


def test_argmax_over_no_rows() -> None:
    graph = model(64, 1, rows="R", opset=23)
    two_stage_argmax(graph.graph)
    assert run(graph, np.zeros((1, 0, 64), np.float32))[1].shape == (1, 0)
