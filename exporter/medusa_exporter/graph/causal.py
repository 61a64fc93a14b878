"""A graph of its own for tokens in a row, plain decoding and prompts: what they may see needs no mask.

Without one ONNX Runtime's GroupQueryAttention takes flash attention on a GPU, which writes no scores out. Weights are
the same tensors, so that two sessions can share them.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.freeze_shapes import remove_draft
from medusa_exporter.graph.single_row_padding import MASK


def causal_graph(model: ir.Model) -> ir.Model:
    """Return a copy, without draft and tree, of a graph in place whose layers all see the whole past.

    Each row sees the past and the rows up to itself: the operator's own rule, by the number of real rows that it is
    given. Of the inputs, `contract.CAUSAL_OMITTED_INPUTS` are gone.
    """
    found = model.clone()
    graph = found.graph
    remove_draft(graph)
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(MASK, None)
    common.RemoveUnusedNodesPass()(found)
    for value in [value for value in graph.inputs if value.name in contract.CAUSAL_OMITTED_INPUTS]:
        graph.inputs.remove(value)
    strip_metadata(found)
    return found
