"""The best of parts, then of these: what one search gives, equal logits and no rows at all included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from medusa_exporter.graph.top import _part, top_in_parts

from .conftest import load

K = 3


def searching(size: int, top: int) -> ir.Model:
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([K, "N", size]))
    count = ir.Value(name="count", const_value=ir.tensor(np.array([top]), name="count"))
    node = ir.node("TopK", [logits, count], num_outputs=2)
    node.outputs[1].name, node.outputs[1].type = "places", ir.TensorType(ir.DataType.INT64)
    node.outputs[1].shape = ir.Shape([K, "N", top])
    same = ir.node("Identity", [node.outputs[1]])
    same.outputs[0].name, same.outputs[0].type = "chosen", ir.TensorType(ir.DataType.INT64)
    same.outputs[0].shape = ir.Shape([K, "N", top])
    graph = ir.Graph([logits], same.outputs, nodes=[node, same], opset_imports={"": 23}, name="top")
    graph.register_initializer(count)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("size", "part"),
    [(16384, 1024), (32000, 1000), (49152, 1024), (128256, 1002), (600, 300), (151936, None)],
)
def test_parts(size: int, part: int | None) -> None:
    assert _part(size) == part


@pytest.mark.parametrize(("size", "top"), [(16384, 14), (600, 10), (512, 300), (300, 5)])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_it_finds_what_one_search_finds(tmp_path: Path, size: int, top: int, rows: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.integers(0, size // 3, (K, rows, size)).astype(np.float32)  # many are equal
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :top]
    for parts in (False, True):
        model = searching(size, top)
        if parts:
            top_in_parts(model)
            searches = [node for node in model.graph if node.op_type == "TopK"]
            assert len(searches) == (1 if _part(size) is None else 2)
        [found] = load(model, tmp_path / "top.onnx").run(None, {"logits": logits})
        np.testing.assert_array_equal(found, expected)
