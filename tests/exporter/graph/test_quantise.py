"""Quantised matrix multiplications against those by the original weights; rows are independent."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.quantise import quantise, quantise_draft, with_precision
from medusa_exporter.precisions import FORMATS, PRECISIONS, WeightFormat
from medusa_runtime.errors import UnsupportedModelError

ROWS, IN, OUT, HEADS = 5, 64, 48, 3
ERROR = {8: 0.01, 4: 0.15}  # relative to the largest result: weights and activations are rounded


def graph(op_type: str, weight: np.ndarray, rows: tuple[int, ...], bias: bool = False, **attributes: float) -> ir.Model:
    """One multiplication of `x` by a weight."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(rows))
    constants = [("weight", weight)] + ([("bias", np.arange(OUT, dtype=np.float32))] if bias else [])
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in constants
    ]
    node = ir.node(op_type, [x, *values], attributes=attributes)
    (y,) = node.outputs
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph([x], [y], nodes=[node], initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(made, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    return np.asarray(y)


def close(found: np.ndarray, expected: np.ndarray, bits: int) -> bool:
    return float(np.abs(found - expected).max()) < ERROR[bits] * float(np.abs(expected).max())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("leading", [(ROWS,), (2, ROWS)])
def test_a_matmul(rng: np.random.Generator, bits: int, leading: tuple[int, ...]) -> None:
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((IN, OUT), (*leading, IN)))
    model = quantise(graph("MatMul", weight, x.shape), WeightFormat(bits, 32))
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert set(model.graph.initializers) == {f"weight.q{bits}", f"weight.q{bits}_scales"}
    assert close(run(model, x), x @ weight, bits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm(rng: np.random.Generator, bias: bool, transposed: bool) -> None:
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((IN, OUT), (ROWS, IN)))
    given = np.ascontiguousarray(weight.T) if transposed else weight
    model = quantise(graph("Gemm", given, x.shape, bias, transB=int(transposed)), WeightFormat(8, 32))
    assert close(run(model, x), x @ weight + (np.arange(OUT) if bias else 0), 8)


def test_a_gemm_with_other_factors_is_refused(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((IN, OUT)).astype(np.float32)
    with pytest.raises(UnsupportedModelError, match="Gemm"):
        quantise(graph("Gemm", weight, (ROWS, IN), alpha=0.5), WeightFormat(8, 32))


@pytest.mark.parametrize("stacked", [1, HEADS])
def test_a_stack_of_heads(rng: np.random.Generator, stacked: int) -> None:
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((HEADS, IN, OUT), (stacked, ROWS, IN)))
    model = quantise(graph("MatMul", weight, x.shape), WeightFormat(8, 32))
    assert [node.op_type for node in model.graph].count("MatMulNBits") == HEADS
    found = run(model, x)
    assert found.shape == (HEADS, ROWS, OUT)
    assert close(found, x @ weight, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_independent(rng: np.random.Generator, bits: int) -> None:
    """With one scale for all rows, a row of large values would change the rounding of the others."""
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((IN, OUT), (ROWS, IN)))
    wild = x.copy()
    wild[1:] *= 1e4
    model = quantise(graph("MatMul", weight, x.shape), WeightFormat(bits, 32))
    np.testing.assert_array_equal(run(model, x)[0], run(model, wild)[0])


def test_matmuls_of_two_activations_stay() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((4, 4)))
    node = ir.node("MatMul", [x, x])
    node.outputs[0].name = "y"
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)
    assert [node.op_type for node in quantise(model, WeightFormat(8, 32)).graph] == ["MatMul"]


def test_the_draft_is_everything_that_tokens_are_computed_from(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((IN, IN)).astype(np.float32)
    model = graph("MatMul", weight, (ROWS, IN))
    drafted = model.graph.outputs[0]
    after = ir.node("MatMul", [drafted, model.graph.initializers["weight"]])
    drafted.name, after.outputs[0].name = "tokens", "logits"
    model.graph.append(after)
    model.graph.outputs.append(after.outputs[0])
    quantise_draft(model, WeightFormat(8, 32))
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMul"]
    quantise(model, WeightFormat(4, 32))  # weights that are quantised already stay
    assert [node.attributes["bits"].as_int() for node in model.graph] == [8, 4]


def test_precisions_share_what_is_not_quantised(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((OUT, IN)).astype(np.float32)
    model = graph("Gemm", weight, (ROWS, IN), bias=True, transB=1)
    assert PRECISIONS["ort-cpu"] == tuple(FORMATS) == ("fp32", "int8", "w8a8", "int4")
    assert [node.op_type for node in with_precision(model, "fp32", {}, {}).graph] == ["Gemm"]
    other = with_precision(model, "int8", {}, {})
    assert [node.op_type for node in model.graph] == ["Gemm"]
    assert other.graph.initializers["bias"].const_value is model.graph.initializers["bias"].const_value


def test_logging_is_left_alone() -> None:
    code = (
        "import logging, numpy; from medusa_exporter.graph.nbits_weight import quantise_blocks\n"
        "from medusa_exporter.precisions import WeightFormat\n"
        "quantise_blocks(numpy.ones((32, 4), numpy.float32), WeightFormat(8, 32)); assert not logging.root.handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
