"""Activation functions in graphs for older TensorRT: only operators of its opset, and the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from medusa_exporter.families import ACTIVATIONS
from medusa_exporter.graph.decompose import IR_VERSION, OPSET, decompose_all
from medusa_exporter.graph.trace import OPSET as TRACED
from medusa_exporter.library_logging import log_errors_only
from medusa_runtime.contract import POSITION_IDS
from onnx import defs
from transformers.activations import ACT2FN

ROWS = torch.linspace(-6, 6, 97).reshape(1, -1)


class Every(torch.nn.Module):
    """All activation functions of the same rows; and positions, an input of every graph."""

    def __init__(self) -> None:
        super().__init__()
        self.every = torch.nn.ModuleList(ACT2FN[name] for name in ACTIVATIONS)

    def forward(self, rows: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(one(rows) for one in self.every), positions + 1)


@pytest.fixture(scope="module")
def graph() -> ir.Model:
    positions = torch.zeros(1, 1, dtype=torch.int32)
    with torch.no_grad(), log_errors_only("torch.onnx"):
        program = torch.onnx.export(
            Every().eval(),
            (ROWS, positions),
            dynamo=True,
            opset_version=TRACED,
            input_names=["rows", POSITION_IDS],
            output_names=[*ACTIVATIONS, "next"],
            verbose=False,
        )
    assert program is not None
    found = program.model.clone()
    table = ir.tensor(np.ones((4, 2), np.float32))
    decompose_all(found, 1, 4, (table, table))
    return found


def test_every_operator_is_in_the_opset(graph: ir.Model) -> None:
    assert (graph.opset_imports[""], graph.ir_version) == (OPSET, IR_VERSION)
    assert "Erf" in {node.op_type for node in graph.graph}
    for node in graph.graph:
        schema = defs.get_schema(node.op_type, TRACED)
        assert defs.get_schema(node.op_type, OPSET, "").name == schema.name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_equal_those_of_transformers(graph: ir.Model, name: str, tmp_path: Path) -> None:
    ir.save(graph, tmp_path / "all.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "all.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run([name], {"rows": ROWS.numpy(), POSITION_IDS: np.zeros((1, 1), np.int32)})
    np.testing.assert_allclose(found, ACT2FN[name](ROWS).numpy(), atol=2e-6)
