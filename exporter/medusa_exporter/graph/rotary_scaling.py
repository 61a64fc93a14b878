"""Handles the attention factor of rotary embeddings (YaRN's and longrope's), which scales cosines and sines.

torch.onnx exports a rotary embedding as one operator only if nothing is between the cosines and sines and the rows that
they rotate. Otherwise it would be decomposed, and neither be fused into attention nor computed in fp32 in graphs in 16
bits. So the factor is removed while the decoder is traced, and put back into the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import constant

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def without_attention_factor(model: PreTrainedModel) -> Iterator[float]:
    """Remove the decoder's attention factor within the block, and yield it; 1 if the decoder has none."""
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    factor = getattr(rotary, "attention_scaling", 1.0)
    if factor == 1.0:
        yield 1.0
        return
    rotary.attention_scaling = 1.0
    try:
        yield float(factor)
    finally:
        rotary.attention_scaling = factor


def apply_attention_factor(graph: ir.Graph, factor: float) -> None:
    """Multiply all cosines and sines of a graph by the factor, in place.

    Raises:
        RuntimeError: The graph has no cosines and sines, and the factor is not 1.
    """
    if factor == 1.0:
        return
    nodes = [node for node in graph if node.op_type in ("Cos", "Sin")]
    if not nodes:
        raise RuntimeError(f"no cosines and sines in the graph, expected some to multiply by {factor}")
    scale = constant(graph, "rope.attention_factor", np.array(factor, np.float32))
    for node in nodes:
        unscaled = node.outputs[0]
        scaled = ir.node("Mul", [unscaled, scale])
        scaled.outputs[0].type, scaled.outputs[0].shape = unscaled.type, unscaled.shape
        graph.insert_after(node, scaled)
        ir.convenience.replace_all_uses_with(unscaled, scaled.outputs[0])
        scaled.replace_input_with(0, unscaled)
