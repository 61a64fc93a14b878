"""Fuses operators for ONNX Runtime: fewer, larger operators between the matrix multiplications.

Each operator call takes some microseconds in addition to its work, and each matrix multiplication wakes the threads
again; with 8-bit and 4-bit weights that is a considerable part of a step. Three rewrites, none of which changes what is
computed:

- matrix multiplications of the same rows become one (`graph.merge_matmuls`);
- GroupQueryAttention reads queries, keys and values from one value, without a Split;
- a residual sum and its norm become SkipSimplifiedLayerNormalization, ONNX Runtime's own operator.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import ORT_DOMAIN, int_attribute, producer_of_type, replace
from medusa_exporter.graph.merge_matmuls import is_constant, merge_matmuls


def fuse(model: ir.Model) -> None:
    """Apply all three rewrites in place. Inputs and outputs keep their names."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    merge_matmuls(graph)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _fuse_residual_sum(graph, node)
        elif node.op_type == "GroupQueryAttention":
            _skip_split(node)
    common.RemoveUnusedNodesPass()(model)
    strip_metadata(model)


def _skip_split(attention: ir.Node) -> None:
    """Let GroupQueryAttention read what was split into queries, keys and values."""
    parts = list(attention.inputs[:3])
    split = producer_of_type(parts[0], "Split")
    if split is None or list(split.outputs) != parts:
        return
    attention.replace_input_with(0, split.inputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


# Not a pattern rule: onnxscript would insert the operator at the norm, behind other consumers of the sum, and its
# pattern, check and replacement take as many lines.
def _fuse_residual_sum(graph: ir.Graph, norm: ir.Node) -> None:
    """Replace Add -> RMSNormalization by one operator that returns both the norm and the sum."""
    total, gain = norm.inputs[0], norm.inputs[1]
    add = producer_of_type(total, "Add")
    if add is None or total is None or total.is_graph_output():
        return
    if any(value is None or value.shape is None or value.shape.rank() != 3 for value in add.inputs):
        return
    if int_attribute(norm, "axis", -1) not in (-1, 2) or not is_constant(gain, rank=1):
        return
    epsilon = norm.attributes["epsilon"] if "epsilon" in norm.attributes else ir.AttrFloat32("epsilon", 1e-5)
    new = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, gain],
        attributes={"epsilon": epsilon.as_float()},
        domain=ORT_DOMAIN,
        num_outputs=4,
        name=f"{norm.name}_sum",
    )
    for index, like in ((0, norm.outputs[0]), (3, total)):
        new.outputs[index].name = f"{like.name}_fused"
        new.outputs[index].type, new.outputs[index].shape = like.type, like.shape
    for index in (1, 2):  # mean and inverse deviation, which are not needed
        new.outputs[index].name = ""
    graph.insert_before(add, new)
    replace(norm.outputs[0], new.outputs[0])
    replace(total, new.outputs[3])
