"""What a weakly typed network may do to a graph."""

from __future__ import annotations

import onnx_ir as ir


def in_16_bits_throughout(graph: ir.Model) -> None:
    """Round every float32 result to fp16: what a weakly typed network may do, whatever it is asked."""
    for node in list(graph.graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and not value.is_graph_output():
                uses = list(value.uses())
                narrow = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16})
                wide = ir.node("Cast", narrow.outputs, attributes={"to": ir.DataType.FLOAT})
                graph.graph.insert_after(node, [narrow, wide])
                for use in uses:
                    use.node.replace_input_with(use.idx, wide.outputs[0])
