"""Decomposes fused operators into primitive ones that TensorRT 8.6 can parse: attention, norms, RoPE and GELU.

It also rewrites what that version supports only in another form. Shapes: B sequences, T nodes, P past rows, W elements
of a row.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime.backends.tensorrt import PAST_MULTIPLE
from medusa_runtime.contract import POSITION_IDS
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.decompose_attention import decompose_attention
from medusa_exporter.graph.decompose_norm import decompose_norm
from medusa_exporter.graph.decompose_rotary import RotaryFactors, decompose_rotary
from medusa_exporter.graph.edit import SLICE_END, NodeBuilder, constant, insert, is_past_input

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
OPSET, IR_VERSION = 17, 8  # of a graph without fused operators; TensorRT 8.6 reads no later ones


# Not pattern rules: each replaces one node, and what they insert needs element types at once (a cast is inserted only
# where types differ), which onnxscript's replacements do not have.
def decompose_all(
    model: ir.Model, nodes: int, context: int, tables: tuple[ir.TensorProtocol, ir.TensorProtocol]
) -> None:
    """Decompose all fused operators and convert the graph to OPSET, in place.

    TensorRT 8.6 has no Range up to a size that is unknown at build time, no Concat or Expand of booleans, and no Shape
    with a start and an end. They become a slice of a constant, the same operator on floats, and a slice of the whole
    shape.

    Args:
        model: A graph of fixed step sizes, with past rows of open length.
        nodes: T.
        context: The largest number of past rows.
        tables: Cosines and sines of all positions (`rotary_tables`), of which the graph reads those of the step's
            nodes. If the graph computed them, a weakly typed engine could multiply positions and frequencies in
            16 bits, which is wrong by radians at large positions.
    """
    graph = model.graph
    _reshape_past(graph)
    may_run_in_fp16 = any(value.dtype == ir.DataType.FLOAT16 for value in graph.inputs)
    [positions] = [value for value in graph.inputs if value.name == POSITION_IDS]
    add = NodeBuilder(graph, graph[0])
    cos, sin = (
        add("Gather", constant(graph, f"angles.{name}", table), positions, axis=0)
        for name, table in zip(("cos", "sin"), tables, strict=True)
    )
    factors = RotaryFactors(add, cos, sin)
    for node in list(graph):
        if node.op_type == "Range":
            _replace_range(graph, node, context)
        elif node.op_type == "Shape":
            _slice_whole_shape(graph, node)
        elif node.op_type in ("Concat", "Expand") and node.outputs[0].dtype == ir.DataType.BOOL:
            _compute_in_floats(graph, node)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # OPSET does not have it
        elif node.op_type in ("RMSNormalization", "LayerNormalization"):
            decompose_norm(graph, node, may_run_in_fp16=may_run_in_fp16)
        elif node.op_type == "RotaryEmbedding":
            decompose_rotary(graph, node, *factors.of(node))
        elif node.op_type == "Gelu":
            _decompose_gelu(graph, node)
        elif node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin"):
            move_axes_to_attribute(node)
    decompose_attention(model, nodes)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    ir.passes.Sequential(common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass())(model)
    strip_metadata(model)


def move_axes_to_attribute(node: ir.Node) -> None:
    """Turn the input `axes` into an attribute, as OPSET has it."""
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is not None:
        node.resize_inputs(1)
        node.attributes.pop("noop_with_empty_axes", None)
        node.attributes.add(ir.AttrInt64s("axes", axes.numpy().tolist()))


def _decompose_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Replace Gelu by 0.5 * x * (1 + erf(x / sqrt 2)) or its tanh approximation, computed in fp32."""
    add, rows = NodeBuilder(graph, node), node.inputs[0]
    assert rows is not None and rows.dtype is not None  # noqa: S101 -- `cast_precision` has set it
    exact = add.cast(rows, FLOAT)
    if "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh":
        cube = add("Mul", add("Mul", exact, exact), exact)
        inner = add("Add", exact, add("Mul", cube, add.scalar(0.044715)))
        share = add("Tanh", add("Mul", inner, add.scalar(float(np.sqrt(2 / np.pi)))))
    else:
        share = add("Erf", add("Mul", exact, add.scalar(float(np.sqrt(0.5)))))
    half = add("Mul", exact, add.scalar(0.5))
    add.replace(add.cast(add("Mul", half, add("Add", share, add.scalar(1.0))), rows.dtype))


def _reshape_past(graph: ir.Graph) -> None:
    """Reshape past rows to (B, P / PAST_MULTIPLE, PAST_MULTIPLE * W) and back to (B, P, W).

    This informs TensorRT that P is a multiple, without which it pads a copy of the rows for every multiplication.
    """
    add = NodeBuilder(graph, graph[0])
    for value in filter(is_past_input, graph.inputs):
        width = None if value.shape is None else value.shape[2]
        assert isinstance(width, int)  # noqa: S101 -- the contract's W
        uses = list(value.uses())
        rows = add.reshape(add.reshape(value, 0, -1, PAST_MULTIPLE * width), 0, -1, width)
        for use in uses:
            use.node.replace_input_with(use.idx, rows)


def _replace_range(graph: ir.Graph, node: ir.Node, context: int) -> None:
    """Replace 0, 1, ... up to the length of the past by a slice of a constant of `context` elements."""
    add, source = NodeBuilder(graph, node), node.inputs[1]
    while source is not None and (producer := source.producer()) is not None:
        if producer.op_type not in ("Cast", "Squeeze"):
            break
        source = producer.inputs[0]
    if source is None or (producer := source.producer()) is None or producer.op_type not in ("Shape", "Slice"):
        raise RuntimeError(f"the limit of Range {node.name} is not a size, expected the length of the past")
    rows = constant(graph, "rows", np.arange(context, dtype=np.int32))
    add.replace(add("Slice", rows, add.ints(0), source, add.ints(0)))


def _slice_whole_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a Shape with a start and an end by a slice of the whole shape, int64."""
    start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    if start is None and end is None:
        return
    add = NodeBuilder(graph, node)
    whole = insert(graph, node, "Shape", node.inputs, INT64)
    add.replace(add("Slice", whole, add.ints(start or 0), add.ints(SLICE_END if end is None else end), add.ints(0)))


def _compute_in_floats(graph: ir.Graph, node: ir.Node) -> None:
    """Let a Concat or Expand of booleans work on 0.0 and 1.0."""
    add = NodeBuilder(graph, node)
    inputs = [
        value if value is None or value.dtype != ir.DataType.BOOL else add.cast(value, FLOAT) for value in node.inputs
    ]
    attributes = {name: one.value for name, one in node.attributes.items()}
    floats = insert(graph, node, node.op_type, inputs, FLOAT, attributes)
    add.replace(insert(graph, node, "Greater", [floats, add.scalar(0.5)], ir.DataType.BOOL))
