"""Integer matrix multiplications on tiny models: close to floats, and each row independent of the others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.calibration import bounded_matmuls, measure_ranges
from medusa_exporter.graph.integer_matmul import use_integer_matmuls
from medusa_runtime import contract
from medusa_runtime.backends.integer_products import EXACT_OPTION

from .conftest import Traced, load
from .test_in_place_kv import garbage, run, step


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(6)
    return [rng.integers(0, 251, size=30).tolist() for _ in range(8)]


def test_ranges_are_the_largest_magnitudes_of_each_channel(traced: Traced, texts: list[list[int]]) -> None:
    size = traced.heads.input_size
    products = bounded_matmuls(traced.cpu_graph.graph)
    # queries, keys and values; output; gate and up
    assert len(products) == 3 * traced.facts.layers
    whole = measure_ranges(traced.cpu_graph, traced.facts, size, texts)
    rows = {str(node.inputs[0].name) for node in products if node.inputs[0] is not None}
    assert len(whole) == len(rows) + 1 and set(whole) > rows  # and the norm that the lm_head reads
    parts = [measure_ranges(traced.cpu_graph, traced.facts, size, [text]) for text in texts]
    for name, found in whole.items():
        np.testing.assert_array_equal(found, np.max([part[name] for part in parts], axis=0))
        assert found.shape == (64 if found.size == 64 else traced.facts.attention_heads * traced.facts.head_dim,)
        assert (found > 0).all()


def integers(traced: Traced, texts: list[list[int]]) -> ir.Model:
    graph = traced.cpu_graph.clone()
    use_integer_matmuls(graph, measure_ranges(graph, traced.facts, traced.heads.input_size, texts))
    return graph


def test_integers_are_close_to_floats(traced: Traced, texts: list[list[int]]) -> None:
    graph = integers(traced, texts)
    kinds = [node.op_type for node in graph.graph]
    # queries, keys and values; output; gate and up; down; the lm_heads of the decoder and of the draft; no stacked head
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("QuantizeLinear")
    assert kinds.count("QuantizeLinear") == 4 * traced.facts.layers + 2 + bool(traced.heads.trunk)
    assert "Gemm" not in kinds
    session = load(graph, traced.path.with_name("integers.onnx"))
    ids = texts[0][:20]
    expected = run(traced.cpu, step(traced, ids, 0), garbage(traced))["logits"][0]
    found = run(session, step(traced, ids, 0), garbage(traced))["logits"][0]
    errors = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert 0 < np.median(errors) < 0.1  # in llama-large a rounded sum near 0 decides over the sign of a huge channel
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.7


def test_a_row_of_zeros_has_zeros_as_its_result() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    model = gated(weight)
    use_integer_matmuls(model, {})
    assert "MatMulIntegerToFloat" in [node.op_type for node in model.graph]
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    x[2] = 0
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    expected = (x * x) @ weight
    assert (y[2] == 0).all()
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("outputs", [48, 2048])
def test_each_row_has_its_own_scale(outputs: int) -> None:
    """A large row beside it changes nothing; above some columns, their scales are an operator of their own."""
    weight = np.random.default_rng(0).standard_normal((64, outputs)).astype(np.float32)
    model = gated(weight)
    use_integer_matmuls(model, {})
    assert [node.op_type for node in model.graph].count("Mul") == (2 if outputs == 48 else 3)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    (alone,) = session.run(["y"], {"x": x[:1]})
    x[1:] *= 1000
    (beside,) = session.run(["y"], {"x": x})
    np.testing.assert_array_equal(beside[0], alone[0])


@pytest.mark.parametrize("outputs", [48, 2048])
def test_a_bias_is_added_by_the_operator(outputs: int) -> None:
    """Unless the columns' scales are an operator of their own; a row has the same bits in both cases."""
    rng = np.random.default_rng(2)
    weight, bias = rng.standard_normal((64, outputs)).astype(np.float32), rng.standard_normal(outputs)
    model = normed(weight, bias.astype(np.float32))
    use_integer_matmuls(model, {"normed": np.full(64, 4, np.float32)})
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Add") == kinds.count("Mul") == (0 if outputs == 48 else 1)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((4, 64)).astype(np.float32)
    (y,) = session.run(["y"], {"x": x})
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True)) @ weight + bias
    np.testing.assert_allclose(y, expected, atol=0.03 * np.abs(expected).max())
    for rows in (1, 2, 3):
        np.testing.assert_array_equal(session.run(["y"], {"x": x[:rows]})[0], y[:rows])


def normed(weight: np.ndarray, bias: np.ndarray) -> ir.Model:
    """y = norm(x) @ weight + bias."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 64]))
    constants = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in (("gain", np.ones(64, np.float32)), ("weight", weight), ("bias", bias))
    ]
    for value in constants:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    norm = ir.node("RMSNormalization", [x, constants[0]])
    product = ir.node("MatMul", [norm.outputs[0], constants[1]])
    y = ir.node("Add", [product.outputs[0], constants[2]])
    for node, name in ((norm, "normed"), (product, "product"), (y, "y")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], y.outputs, nodes=[norm, product, y], initializers=constants, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def gated(weight: np.ndarray) -> ir.Model:
    """(x · x) @ weight, whose rows come from a product as in a gated MLP."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["T", len(weight)]))
    constant = ir.Value(name="w", const_value=ir.tensor(weight, name="w"), shape=ir.Shape(weight.shape))
    product = ir.node("Mul", [x, x])
    node = ir.node("MatMul", [product.outputs[0], constant])
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["T", weight.shape[1]])
    graph = ir.Graph([x], [y], nodes=[product, node], initializers=[constant], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_the_session_option_for_exact_sums_changes_no_bit(traced: Traced, texts: list[list[int]]) -> None:
    """Processors without VNNI need it (`medusa_runtime.backends.integer_products`); here it selects other kernels."""
    path = traced.path.with_name("integers.onnx")
    ir.save(integers(traced, texts), path)
    found = []
    for option in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(EXACT_OPTION, option)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(run(session, step(traced, texts[0][:9], 0), garbage(traced))["logits"])
    np.testing.assert_array_equal(found[0], found[1])


def test_rows_are_independent(traced: Traced, texts: list[list[int]]) -> None:
    session = load(integers(traced, texts), traced.path.with_name("integers.onnx"))
    found = []
    for beside in ([3, 4], [200, 250], [9, 9, 9, 9]):
        buffers = garbage(traced)
        run(session, step(traced, texts[1][:10], 0), buffers)
        done = run(session, step(traced, [7, *beside], 10), buffers)
        found.append((done["logits"][0, 0], buffers[contract.past_key(1)][0, :, 10].copy()))
    for logits, keys in found[1:]:
        np.testing.assert_array_equal(keys, found[0][1])
        np.testing.assert_allclose(logits, found[0][0], atol=1e-5)
