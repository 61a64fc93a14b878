"""Cleans up a freshly traced graph: row-major rotary embeddings, no redundant reshapes or duplicates, short names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import TensorSpec
from onnx_ir.passes import common

from medusa_exporter.graph.edit import constant, only_consumer, producer_of_type
from medusa_exporter.graph.rotary_fusion import fuse_rotary_embeddings, swaps_heads


def clean_up(model: ir.Model) -> None:
    """Apply all clean-up rewrites in place."""
    graph = model.graph
    fuse_rotary_embeddings(model)
    common.RemoveUnusedNodesPass()(model)  # or values would still have consumers that are no longer needed
    for node in list(graph):
        if node.op_type == "RotaryEmbedding":
            _make_row_major(graph, node)
    for node in list(graph):
        if node.op_type == "Reshape":
            _shorten_reshapes(node)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    strip_metadata(model)


# Not a pattern rule: onnxscript inserts the replacement after the last matched node, which reorders the graph.
def _make_row_major(graph: ir.Graph, rotary: ir.Node) -> None:
    """Replace Transpose -> RotaryEmbedding (B, heads, T, D) -> Transpose -> Reshape by RotaryEmbedding (B, T, W).

    The 3-D form of the operator (ONNX opset 23) reads and writes rows as the KV cache stores them, W = heads * D.
    """
    before, after = producer_of_type(rotary.inputs[0], "Transpose"), only_consumer(rotary.outputs[0], "Transpose")
    if before is None or after is None or not (swaps_heads(before) and swaps_heads(after)):
        return
    rows = only_consumer(after.outputs[0], "Reshape")
    split = before.inputs[0]  # (B, T, heads, D)
    if rows is None or split is None or split.shape is None or len(split.shape) != 4:
        return
    heads, width = split.shape[2], split.shape[3]
    if not (isinstance(heads, int) and isinstance(width, int)):
        return
    source = _row_major_source(split, heads * width)
    if source is None:
        shape = constant(graph, f"{rotary.name}_rows", np.array([0, 0, heads * width]))
        join = ir.node("Reshape", [split, shape])
        join.outputs[0].shape = ir.Shape([split.shape[0], split.shape[1], heads * width])
        join.outputs[0].type = split.type
        graph.insert_before(rotary, join)
        source = join.outputs[0]
    attributes = {name: value for name, value in rotary.attributes.items() if name != "num_heads"}
    new = ir.node("RotaryEmbedding", [source, *rotary.inputs[1:]], attributes={**attributes, "num_heads": heads})
    new.outputs[0].shape = ir.Shape([split.shape[0], split.shape[1], heads * width])
    new.outputs[0].type = split.type
    graph.insert_before(rotary, new)
    _replace(rows.outputs[0], new.outputs[0])


def _row_major_source(split: ir.Value, width: int) -> ir.Value | None:
    """Return the (B, T, width) value that `split` (B, T, heads, D) was reshaped from, or None."""
    reshape = producer_of_type(split, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 3 or source.shape[2] != width:
        return None
    return source


# onnxscript's own rule for two Reshapes merges no shape with two symbolic sizes, which (B, T, W) has.
def _shorten_reshapes(reshape: ir.Node) -> None:
    """Merge a chain of Reshapes into its last one, or remove it if the last shape equals the first.

    For example, (B, T, W) -> (B, T, heads, D) -> (B, T, W) disappears.
    """
    end = reshape.outputs[0]
    value = reshape.inputs[0]
    while value is not None and (earlier := producer_of_type(value, "Reshape")) is not None:
        value = earlier.inputs[0]
    allow_zero = reshape.attributes.get("allowzero")
    if allow_zero is not None and allow_zero.as_int():  # no size is copied from the input, so any input will do
        reshape.replace_input_with(0, value)
    if value is None or value.shape is None or end.shape is None:
        return
    if _sizes(value.shape) == _sizes(end.shape) and None not in _sizes(value.shape):
        _replace(end, value)


def _sizes(shape: ir.Shape) -> list[int | str | None]:
    """Return integers, the names of symbolic sizes, and None for unknown sizes."""
    return [size if isinstance(size, int) else size.value for size in shape]


def _replace(old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def strip_metadata(model: ir.Model) -> None:
    """Remove the exporter's metadata (most of a graph's file size) and rename nodes and inner values to `n<index>`.

    The short names cannot clash with those of graph inputs and outputs.
    """
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


def declare_signature(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Set names, types and symbolic dimensions of all inputs and outputs to those of the contract."""
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if len(values) != len(specs):
            raise RuntimeError(f"the graph has {len(values)} inputs or outputs, expected {len(specs)} as the contract")
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
            value.dtype = ir.DataType[{"float32": "FLOAT"}.get(spec.dtype, spec.dtype.upper())]
