"""Makes the causal graph: a separate graph for plain decoding and prompts, without draft, tree and mask.

Without a mask ONNX Runtime's GroupQueryAttention uses flash attention on a GPU, which does not write scores to memory.
The weights are the same tensors as those of the graph for trees, so that two sessions can share them.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.freeze_shapes import remove_draft
from medusa_exporter.graph.in_place_kv import MASK


def causal_graph(model: ir.Model) -> ir.Model:
    """Return a causal copy of a graph that writes keys and values in place; without `contract.CAUSAL_OMITTED_INPUTS`.

    Each row sees the past and the step's rows up to itself, which is what the operator does without a mask. Layers with
    a sliding window would need one.
    """
    causal = model.clone()
    graph = causal.graph
    remove_draft(graph)
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(MASK, None)
    common.RemoveUnusedNodesPass()(causal)
    for value in [value for value in graph.inputs if value.name in contract.CAUSAL_OMITTED_INPUTS]:
        graph.inputs.remove(value)
    strip_metadata(causal)
    return causal
