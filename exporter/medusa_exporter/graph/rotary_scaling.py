"""A rope's attention factor (YaRN's and longrope's): taken out while a decoder is traced, put back into the graph.

torch.onnx makes one operator of a rope only where nothing stands between cosines, sines and the rows that they turn.
Spelt out, the rope would be neither absorbed by attention nor computed in fp32 for graphs in 16 bits.
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
    """Within the block the decoder's rope leaves its attention factor out; give that factor, 1 where it has none."""
    rope: Any = getattr(model.base_model, "rotary_emb", None)
    factor = getattr(rope, "attention_scaling", 1.0)
    if factor == 1.0:
        yield 1.0
        return
    rope.attention_scaling = 1.0
    try:
        yield float(factor)
    finally:
        rope.attention_scaling = factor


def apply_attention_factor(graph: ir.Graph, factor: float) -> None:
    """Multiply cosines and sines by the factor, in place. Raises RuntimeError where the graph has none."""
    if factor == 1.0:
        return
    nodes = [node for node in graph if node.op_type in ("Cos", "Sin")]
    if not nodes:
        raise RuntimeError(f"no cosines and sines in the graph, expected those of a rope to be multiplied by {factor}")
    scale = constant(graph, "rope.attention_factor", np.array(factor, np.float32))
    for node in nodes:
        angles = node.outputs[0]
        scaled = ir.node("Mul", [angles, scale])
        scaled.outputs[0].type, scaled.outputs[0].shape = angles.type, angles.shape
        graph.insert_after(node, scaled)
        ir.convenience.replace_all_uses_with(angles, scaled.outputs[0])
        scaled.replace_input_with(0, angles)
