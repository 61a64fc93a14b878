"""Rewrites of a freshly traced graph: row-major rope, no reshapes that change nothing, no duplicates, short names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import TensorSpec
from onnx_ir.passes import common

from medusa_exporter.graph.edit import constant, only_consumer
from medusa_exporter.graph.rotary_fusion import fuse_rotary_embeddings, producer, swaps_heads


def clean_up(model: ir.Model) -> None:
    """Apply all rewrites in place."""
    graph = model.graph
    fuse_rotary_embeddings(graph)
    common.RemoveUnusedNodesPass()(model)  # what spelt a rope out, so that each value has its last users alone
    for node in list(graph):
        if node.op_type == "RotaryEmbedding":
            _rope_on_rows(graph, node)
    for node in list(graph):
        if node.op_type == "Reshape":
            _skip_reshape(node)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    strip_metadata(model)


def _rope_on_rows(graph: ir.Graph, rope: ir.Node) -> None:
    """Transpose -> RotaryEmbedding (B, heads, T, D) -> Transpose -> Reshape becomes RotaryEmbedding on (B, T, W).

    The 3-D form of the operator (ONNX opset 23) reads and writes rows as the KV arenas hold them.
    """
    before, after = producer(rope.inputs[0], "Transpose"), only_consumer(rope.outputs[0], "Transpose")
    if before is None or after is None or not (swaps_heads(before) and swaps_heads(after)):
        return
    rows = only_consumer(after.outputs[0], "Reshape")
    split = before.inputs[0]  # (B, T, heads, D)
    if rows is None or split is None or split.shape is None or len(split.shape) != 4:
        return
    heads, width = split.shape[2], split.shape[3]
    if not (isinstance(heads, int) and isinstance(width, int)):
        return
    source = _flat_source(split, heads * width)
    if source is None:
        shape = constant(graph, f"{rope.name}_rows", np.array([0, 0, heads * width]))
        join = ir.node("Reshape", [split, shape])
        join.outputs[0].shape = ir.Shape([split.shape[0], split.shape[1], heads * width])
        join.outputs[0].type = split.type
        graph.insert_before(rope, join)
        source = join.outputs[0]
    attributes = {name: value for name, value in rope.attributes.items() if name != "num_heads"}
    new = ir.node("RotaryEmbedding", [source, *rope.inputs[1:]], attributes={**attributes, "num_heads": heads})
    new.outputs[0].shape = ir.Shape([split.shape[0], split.shape[1], heads * width])
    new.outputs[0].type = split.type
    graph.insert_before(rope, new)
    _replace(rows.outputs[0], new.outputs[0])


def _flat_source(split: ir.Value, width: int) -> ir.Value | None:
    """Return the (B, T, width) value that `split` (B, T, heads, D) was reshaped from, if there is one."""
    reshape = producer(split, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 3 or source.shape[2] != width:
        return None
    return source


def _skip_reshape(reshape: ir.Node) -> None:
    """Make a chain of Reshapes one, or none where it ends in the shape it began with: (B, T, W) -> … -> (B, T, W)."""
    end = reshape.outputs[0]
    value = reshape.inputs[0]
    while value is not None and (earlier := producer(value, "Reshape")) is not None:
        value = earlier.inputs[0]
    allow_zero = reshape.attributes.get("allowzero")
    if allow_zero is not None and allow_zero.as_int():  # no size is taken over from the input: any will do
        reshape.replace_input_with(0, value)
    if value is None or value.shape is None or end.shape is None:
        return
    if _sizes(value.shape) == _sizes(end.shape) and None not in _sizes(value.shape):
        _replace(end, value)


def _sizes(shape: ir.Shape) -> list[int | str | None]:
    """Return whole numbers, the names of symbolic sizes, and None for a size that nothing is known of."""
    return [size if isinstance(size, int) else size.value for size in shape]


def _replace(old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def strip_metadata(model: ir.Model) -> None:
    """Drop the tracer's notes (most of the file) and give inner values short names that cannot clash with outputs."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "medusa-export", None, None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    outputs = set(model.graph.outputs)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
        node.doc_string = None
        node.metadata_props.clear()
        for position, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"n{index}_{position}"
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def declare_signature(graph: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Give every input and output the contract's name, and its symbolic dimensions in place of those of the tracer."""
    for values, specs in ((graph.graph.inputs, inputs), (graph.graph.outputs, outputs)):
        if len(values) != len(specs):
            raise RuntimeError(f"the traced graph has {len(values)} inputs or outputs, the contract {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
            value.dtype = ir.DataType[{"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())]
