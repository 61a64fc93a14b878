"""Lowers fused operators to what any backend can parse: attention, norms and rope spelt out in ONNX's primitives.

Whatever the type of the rows, softmax, a norm's statistics and rope are computed in fp32. Shapes: B sequences, T nodes,
P rows of the past, S = P + T, Hkv key heads of D elements, each shared by G query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from medusa_runtime.backends.tensorrt import PAST_MULTIPLE
from medusa_runtime.contract import POSITION_IDS
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.decompose_rotary import RotaryFactors, turn
from medusa_exporter.graph.edit import SLICE_END, NodeBuilder, constant, insert, is_past_input, past_and_new

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
OPSET, IR_VERSION = 17, 8  # of a graph with no fused operator left; what TensorRT 8.6 reads
SHRUNK = 256.0  # what rows are divided by so that fp16 holds the square of any element
LARGEST = 0.9  # of the squares of a row so shrunk, if they add up to less, no square of the row itself is beyond fp16


def decompose_attention(model: ir.Model, nodes: int | None = None) -> None:
    """Spell every Attention out, in place.

    nodes: T, where a graph is for TensorRT. 8.6 crashes on past and new rows as one where no heads share their keys:
    there both are multiplied apart, and only the scores are joined.
    """
    graph = model.graph
    masks: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention":
            _attend(graph, node, masks, nodes)
    common.RemoveUnusedNodesPass()(model)
    strip_metadata(model)


def softcap_of(node: ir.Node) -> float:
    """Return what bounds an attention's scores, 0 where nothing does."""
    return node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0


def decompose_all(
    model: ir.Model, nodes: int, context: int, angles: tuple[ir.TensorProtocol, ir.TensorProtocol]
) -> None:
    """Spell attention, norms and rope out and make the graph one of OPSET, in place.

    nodes: T. context: rows of the past at most. angles: `rotary_tables`, of which each position's are read: where
    types are weak they would be products in 16 bits, wrong by radians at large positions. TensorRT 8.6 counts up to no
    length that it does not know, joins no truth values and takes no part of a shape: the first becomes a slice of a
    constant, the second is done in floats, the third is cut from the whole shape.
    """
    graph = model.graph
    _in_units(graph)
    narrow = any(value.dtype == ir.DataType.FLOAT16 for value in graph.inputs)
    [positions] = [value for value in graph.inputs if value.name == POSITION_IDS]
    add = NodeBuilder(graph, graph[0])
    cos, sin = (
        add("Gather", constant(graph, f"angles.{name}", table), positions, axis=0)
        for name, table in zip(("cos", "sin"), angles, strict=True)
    )
    turning = RotaryFactors(add, cos, sin)
    for node in list(graph):
        if node.op_type == "Range":
            _count(graph, node, context)
        elif node.op_type == "Shape":
            _whole_shape(graph, node)
        elif node.op_type in ("Concat", "Expand") and node.outputs[0].dtype == ir.DataType.BOOL:
            _in_floats(graph, node)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # which OPSET does not know
        elif node.op_type in ("RMSNormalization", "LayerNormalization"):
            _norm(graph, node, narrow=narrow)
        elif node.op_type == "RotaryEmbedding":
            turn(graph, node, *turning.of(node))
        elif node.op_type == "Gelu":
            _gelu(graph, node)
        elif node.op_type == "ReduceMean":
            _mean(node)
    decompose_attention(model, nodes)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    ir.passes.Sequential(common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass())(model)
    strip_metadata(model)


def _attend(graph: ir.Graph, node: ir.Node, masks: dict[ir.Value, ir.Value], nodes: int | None) -> None:
    add = NodeBuilder(graph, node)
    query, keys, values, mask = node.inputs[:4]
    assert query is not None and mask is not None and query.dtype is not None  # noqa: S101 -- all are traced with a mask
    heads, key_heads = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    group, scale = heads // key_heads, node.attributes["scale"].as_float()
    width = query.shape[-1] if query.shape is not None else None
    if not isinstance(width, int):
        raise RuntimeError(f"attention {node.name} has queries of unknown width")  # noqa: TRY004
    size = width // heads

    def split_heads(rows: ir.Value, permutation: Sequence[int]) -> ir.Value:
        return add("Transpose", add.reshape(rows, 0, 0, key_heads, size), perm=permutation)

    # (B, T, H * D) -> (B, Hkv, G * T, D): the query heads of a key head are rows of one product
    rows = add("Transpose", add.reshape(query, 0, 0, key_heads, group, size), perm=[0, 2, 3, 1, 4])
    rows = add.reshape(rows, 0, key_heads, -1, size)
    apart = nodes if group == 1 else None
    parts = [past_and_new(both) for both in (keys, values)] if apart else [(keys,), (values,)]
    all_keys, all_values = parts
    scores = [add("MatMul", rows, split_heads(part, [0, 2, 3, 1])) for part in all_keys if part is not None]
    joined = add("Concat", *scores, axis=-1) if len(scores) > 1 else scores[0]  # (B, Hkv, G * T, S)
    scaled = add("Mul", add.cast(joined, FLOAT), add.number(scale))
    if cap := softcap_of(node):
        scaled = add("Mul", add("Tanh", add("Mul", scaled, add.number(1 / cap))), add.number(cap))
    if mask not in masks:
        masks[mask] = mask if group == 1 else add("Concat", *[mask] * group, axis=2)  # (B, 1, G * T, S)
    weights = add.cast(add("Softmax", add("Add", scaled, masks[mask]), axis=-1), query.dtype)
    shares = [add.slice(weights, 0, -apart), add.slice(weights, -apart, SLICE_END)] if apart else [weights]
    sums = [
        add("MatMul", share, split_heads(part, [0, 2, 1, 3]))
        for share, part in zip(shares, all_values, strict=True)
        if part is not None
    ]
    summed = add("Add", *sums) if len(sums) > 1 else sums[0]  # (B, Hkv, G * T, D)
    output = add("Transpose", add.reshape(summed, 0, key_heads, group, -1, size), perm=[0, 3, 1, 2, 4])
    add.replace(add.reshape(output, 0, 0, width))


def _norm(graph: ir.Graph, node: ir.Node, *, narrow: bool) -> None:
    """X / sqrt(mean(x^2) + epsilon) * gain, statistics in fp32; a layer's norm takes the mean from x, and adds a bias.

    narrow: where they may be in fp16 all the same, which holds no square of a large element. Then squares are taken of
    the row as it is and of the row over SHRUNK, and those of the first count where none can be too large.
    """
    add, (rows, gain) = NodeBuilder(graph, node), node.inputs[:2]
    assert rows is not None and rows.dtype is not None  # noqa: S101
    if "axis" in node.attributes and node.attributes["axis"].as_int() != -1:
        raise RuntimeError(f"norm {node.name} is not over the last axis")
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    exact = add.cast(rows, FLOAT)
    if node.op_type == "LayerNormalization":
        exact = add("Sub", exact, add("ReduceMean", exact, axes=[-1], keepdims=1))

    def mean_square(values: ir.Value) -> ir.Value:
        return add("ReduceMean", add("Mul", values, values), axes=[-1], keepdims=1)

    size = add("Sqrt", add("Add", mean_square(exact), add.number(epsilon)))
    if narrow:
        width = gain.shape[0] if gain is not None and gain.shape is not None else None
        assert isinstance(width, int)  # noqa: S101 -- a gain is a constant
        shrunk = mean_square(add("Mul", exact, add.number(1 / SHRUNK)))  # of large rows, epsilon is nothing to these
        large = add("Mul", add("Sqrt", shrunk), add.number(SHRUNK))
        small = insert(graph, node, "Less", [shrunk, add.number(LARGEST / width)], ir.DataType.BOOL)
        size = insert(graph, node, "Where", [small, size, large], FLOAT)
    normed = add("Mul", add.cast(add("Div", exact, size), rows.dtype), gain)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    add.replace(normed if bias is None else add("Add", normed, bias))


def _mean(node: ir.Node) -> None:
    """Name the axes by an attribute, as OPSET does, in place of an input."""
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is not None:
        node.resize_inputs(1)
        node.attributes.pop("noop_with_empty_axes", None)
        node.attributes.add(ir.AttrInt64s("axes", axes.numpy().tolist()))


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    """X * Phi(x), by the error function or by tanh as the node says; inside in fp32."""
    add, rows = NodeBuilder(graph, node), node.inputs[0]
    assert rows is not None and rows.dtype is not None  # noqa: S101 -- typed before
    exact = add.cast(rows, FLOAT)
    if "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh":
        cube = add("Mul", add("Mul", exact, exact), exact)
        inner = add("Add", exact, add("Mul", cube, add.number(0.044715)))
        share = add("Tanh", add("Mul", inner, add.number(float(np.sqrt(2 / np.pi)))))
    else:
        share = add("Erf", add("Mul", exact, add.number(float(np.sqrt(0.5)))))
    half = add("Mul", exact, add.number(0.5))
    add.replace(add.cast(add("Mul", half, add("Add", share, add.number(1.0))), rows.dtype))


def _in_units(graph: ir.Graph) -> None:
    """Let the past arrive in units of PAST_MULTIPLE rows, or TensorRT pads a copy of it for every product."""
    add = NodeBuilder(graph, graph[0])
    for value in filter(is_past_input, graph.inputs):
        width = None if value.shape is None else value.shape[2]
        assert isinstance(width, int)  # noqa: S101 -- the contract's W
        uses = list(value.uses())
        rows = add.reshape(add.reshape(value, 0, -1, PAST_MULTIPLE * width), 0, -1, width)
        for use in uses:
            use.node.replace_input_with(use.idx, rows)


def _count(graph: ir.Graph, node: ir.Node, context: int) -> None:
    """0, 1, … up to a size of the past, by a slice of a constant."""
    add, source = NodeBuilder(graph, node), node.inputs[1]
    while source is not None and (made := source.producer()) is not None and made.op_type in ("Cast", "Squeeze"):
        source = made.inputs[0]
    if source is None or (made := source.producer()) is None or made.op_type not in ("Shape", "Slice"):
        raise RuntimeError(f"{node.name} counts up to something else than a size")
    rows = constant(graph, "rows", np.arange(context, dtype=np.int32))
    add.replace(add("Slice", rows, add.ints(0), source, add.ints(0)))


def _whole_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Shape with a start and an end becomes a slice of the whole shape, which stays int64."""
    start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    if start is None and end is None:
        return
    add = NodeBuilder(graph, node)
    whole = insert(graph, node, "Shape", node.inputs, INT64)
    add.replace(add("Slice", whole, add.ints(start or 0), add.ints(SLICE_END if end is None else end), add.ints(0)))


def _in_floats(graph: ir.Graph, node: ir.Node) -> None:
    """Join or spread truth values as 0 and 1."""
    add = NodeBuilder(graph, node)
    inputs = [
        value if value is None or value.dtype != ir.DataType.BOOL else add.cast(value, FLOAT) for value in node.inputs
    ]
    spread = insert(
        graph, node, node.op_type, inputs, FLOAT, {name: one.value for name, one in node.attributes.items()}
    )
    add.replace(insert(graph, node, "Greater", [spread, add.number(0.5)], ir.DataType.BOOL))
