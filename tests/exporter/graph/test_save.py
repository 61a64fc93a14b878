"""Tensors that several graphs share are written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from medusa_exporter.graph.save import save_graphs

SIZE = 16


def adding(*tensors: ir.TensorProtocol) -> ir.Model:
    """A graph that adds constants to `x`, one after the other."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((SIZE, SIZE)))
    values = [
        ir.Value(name=f"c{index}", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        for index, tensor in enumerate(tensors)
    ]
    nodes: list[ir.Node] = []
    for value in values:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0] if nodes else x, value]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    return ir.Model(
        ir.Graph([x], [y], nodes=nodes, initializers=values, opset_imports={"": 23}, name="g"), ir_version=10
    )


def run(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": np.zeros((SIZE, SIZE), np.float32)})
    assert (np.asarray(y) == y.flat[0]).all()
    return float(y.flat[0])


def full(number: float, shape: tuple[int, ...] = (SIZE, SIZE)) -> ir.TensorProtocol:
    return ir.tensor(np.full(shape, number, np.float32))


def test_a_tensor_of_two_graphs_is_written_once(tmp_path: Path) -> None:
    both, small = full(1), full(100, (1,))
    graphs = {tmp_path / "a.onnx": adding(both, full(10), small), tmp_path / "b.onnx": adding(full(20), both, small)}
    save_graphs(graphs, "shared.data")
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.data")} == {
        "shared.data": 1024,
        "a.onnx.data": 1024,
        "b.onnx.data": 1024,
    }
    assert [run(path) for path in graphs] == [111, 121]
    for path in graphs:
        onnx.checker.check_model(str(path), full_check=True)


def test_a_single_graph_has_no_shared_file(tmp_path: Path) -> None:
    save_graphs({tmp_path / "a.onnx": adding(full(1), full(2))}, "shared.data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert run(tmp_path / "a.onnx") == 3
