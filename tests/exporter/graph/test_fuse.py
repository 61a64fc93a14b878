"""Each fusion on a small graph: the results stay the same, and the expected operators are there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from medusa_exporter.graph.fuse import fuse

PRODUCTS = """
<ir_version: 10, opset_import: ["": 23]>
step (float[B,T,8] x) => (float[B,T,8] y, float[B,T,4] z)
{
    a = MatMul(x, wa)
    b = MatMul(x, wb)
    z = MatMul(x, wc)
    s = Sigmoid(a)
    y = Mul(s, b)
}
"""
BIASES = PRODUCTS.replace("z = MatMul(x, wc)", "c = MatMul(x, wc)\n z = Add(c, bc)").replace(
    "s = Sigmoid(a)\n    y = Mul(s, b)", "d = Add(a, ba)\n e = Add(bb, b)\n s = Sigmoid(d)\n y = Mul(s, e)"
)
NORMS = """
<ir_version: 10, opset_import: ["": 23]>
step (float[B,T,8] x, float[B,T,8] r) => (float[B,T,8] y, float[B,T,8] z)
{
    s = Add(x, r)
    n = RMSNormalization<axis = -1, epsilon = 0.01>(s, gain)
    m = Mul(n, r)
    z = Add(s, m)
    y = RMSNormalization<axis = -1>(z, gain)
}
"""


def model(text: str) -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {name: (8, 4 if name == "wc" else 8) for name in ("wa", "wb", "wc")}
    shapes |= {"ba": (8,), "bb": (8,), "bc": (4,), "gain": (8,)}
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        if f"{name})" in text or f"({name}" in text:
            array = rng.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def run(of: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(of).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def fused(text: str) -> dict[str, int]:
    """Fuse, check that the results are the same, and count the operators."""
    before, after = model(text), model(text)
    fuse(after)
    rng = np.random.default_rng(1)
    inputs = {
        str(value.name): rng.standard_normal((2, 3, int(value.shape[2]))).astype(np.float32)
        for value in before.graph.inputs
        if value.shape is not None
    }
    expected, found = run(before, inputs), run(after, inputs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)
    counts: dict[str, int] = {}
    for node in after.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def test_matmuls_of_the_same_rows_are_merged() -> None:
    assert fused(PRODUCTS) == {"MatMul": 1, "Split": 1, "Sigmoid": 1, "Mul": 1}


def test_their_biases_are_merged() -> None:
    assert fused(BIASES) == {"MatMul": 1, "Add": 1, "Split": 1, "Sigmoid": 1, "Mul": 1}


def test_biases_stay_if_not_every_matmul_has_one() -> None:
    assert fused(BIASES.replace("d = Add(a, ba)", "d = Sigmoid(a)"))["Add"] == 2


def test_a_residual_sum_and_its_norm_are_fused() -> None:
    assert fused(NORMS) == {"SkipSimplifiedLayerNormalization": 1, "Mul": 1, "Add": 1, "RMSNormalization": 1}


def test_weights_are_concatenated_only_when_they_are_read() -> None:
    after = model(PRODUCTS)
    fuse(after)
    (joined,) = [value.const_value for value in after.graph.initializers.values() if "|" in str(value.name)]
    assert isinstance(joined, ir.LazyTensor)
    assert joined.numpy().shape == (8, 20)
