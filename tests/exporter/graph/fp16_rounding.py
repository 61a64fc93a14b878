"""Rounds a graph's results to fp16, as a weakly typed TensorRT network may."""

from __future__ import annotations

import onnx_ir as ir


def round_to_fp16(graph: ir.Model) -> None:
    """Round every fp32 result to fp16, as a weakly typed network may do even where the graph says fp32."""
    for node in list(graph.graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and not value.is_graph_output():
                uses = list(value.uses())
                narrow = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16})
                wide = ir.node("Cast", narrow.outputs, attributes={"to": ir.DataType.FLOAT})
                graph.graph.insert_after(node, [narrow, wide])
                for use in uses:
                    use.node.replace_input_with(use.idx, wide.outputs[0])
