"""A decomposed norm whose every value is rounded to fp16, for small and large rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.decompose import decompose_all
from medusa_runtime.contract import POSITION_IDS
from onnx import TensorProto, helper, numpy_helper

from .fp16_rounding import round_to_fp16

WIDTH, ROWS, EPSILON = 576, 8, 1e-5


def norm() -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("RMSNormalization", ["x", "gain"], ["y"], axis=-1, epsilon=EPSILON)],
        "norm",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, ROWS, WIDTH]),
            helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT32, [1, ROWS]),
            helper.make_tensor_value_info("narrow", TensorProto.FLOAT16, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, ROWS, WIDTH])],
        [numpy_helper.from_array(np.ones(WIDTH, np.float32), "gain")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


@pytest.mark.parametrize("largest", [0.0, 0.004, 0.05, 1.0, 100.0, 229.0, 241.0, 25000.0, 65000.0], ids=str)
@pytest.mark.parametrize("others", [0.05, 1.0], ids=str)
def test_a_norm_in_16_bits(tmp_path: Path, largest: float, others: float) -> None:
    """One element of each row is large and the others are of similar size, as in real models."""
    rows = np.random.default_rng(0).standard_normal((1, ROWS, WIDTH)) * min(others, largest)
    rows[..., 7] = largest
    rows = rows.astype(np.float16).astype(np.float32)
    graph, table = norm(), ir.tensor(np.ones((4, 2), np.float32))
    decompose_all(graph, 1, 4, (table, table))
    round_to_fp16(graph)
    ir.save(graph, tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "norm.onnx"), providers=["CPUExecutionProvider"])
    given = {"x": rows, POSITION_IDS: np.zeros((1, ROWS), np.int32), "narrow": np.zeros(1, np.float16)}
    [found] = session.run(["y"], {one.name: given[one.name] for one in session.get_inputs()})
    exact = rows.astype(np.float64)
    wanted = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(found, wanted, atol=0.002 * max(1.0, float(np.abs(wanted).max())))
