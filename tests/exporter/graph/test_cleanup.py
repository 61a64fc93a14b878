"""Each clean-up rewrite on a small graph that is written as text."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from medusa_exporter.graph.cleanup import clean_up

ROTARY = """
<ir_version: 10, opset_import: ["": 23]>
step (float[B,T,64] x, float[B,T,8] cos, float[B,T,8] sin) => (float[B,T,64] y)
<int64[4] split = {0, 0, 4, 16}, int64[3] join = {0, 0, 64}>
{
    apart = Reshape(x, split)
    heads_first = Transpose<perm = [0, 2, 1, 3]>(apart)
    rotated = RotaryEmbedding<interleaved = 0>(heads_first, cos, sin)
    rows_first = Transpose<perm = [0, 2, 1, 3]>(rotated)
    y = Reshape(rows_first, join)
}
"""
RESHAPES = """
<ir_version: 10, opset_import: ["": 23]>
step (float[B,T,64] x) => (float[B,T,64] y, float[B,T,32] z)
<int64[4] split = {0, 0, 4, 16}, int64[3] join = {0, 0, 64}, int64[3] wide = {0, -1, 32}>
{
    doubled = Add(x, x)
    apart = Reshape(doubled, split)
    same = Reshape(apart, join)
    y = Mul(same, same)
    other = Reshape(doubled, wide)
    z = Mul(other, other)
}
"""


def tidied(text: str) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    clean_up(model)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return model


def test_rotary_embedding_becomes_row_major() -> None:
    model = tidied(ROTARY)
    (rotary,) = model.graph
    assert rotary.op_type == "RotaryEmbedding"
    assert rotary.attributes["num_heads"].as_int() == 4
    assert rotary.inputs[0] is not None
    assert rotary.inputs[0].name == "x"
    assert rotary.outputs[0] is model.graph.outputs[0]  # with its original name


def test_reshapes_that_cancel_out_are_removed_and_others_stay() -> None:
    ops = [node.op_type for node in tidied(RESHAPES).graph]
    assert ops == ["Add", "Mul", "Reshape", "Mul"]


def test_a_chain_of_reshapes_is_merged() -> None:
    text = RESHAPES.replace("other = Reshape(doubled, wide)", "other = Reshape<allowzero = 1>(apart, wide)")
    model = tidied(text.replace("wide = {0, -1, 32}", "wide = {3, -1, 32}"))
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Reshape", "Mul"]
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[0] is not None
    producer = reshape.inputs[0].producer()
    assert producer is not None
    assert producer.op_type == "Add"


def test_inner_names_cannot_clash_with_outputs() -> None:
    model = tidied(RESHAPES.replace("doubled", "n3_0"))
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert {"y", "z"} <= set(names)
    assert all(node.doc_string is None and not node.metadata_props for node in model.graph)
