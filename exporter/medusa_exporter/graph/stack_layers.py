"""Stacks the KV rows of all layers into one input and one output, for TensorRT.

With some hundred inputs and outputs, TensorRT 8.6 converts each of them to fp32 and back, although both sides are fp16.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract
from medusa_runtime.backends.kv_arena import kv_tensor_names

from medusa_exporter.graph.edit import insert


def stack_layers(graph: ir.Graph, layers: int) -> None:
    """Replace each layer's rows by one input `past` and one output `new` (`contract.stacked_specs`), in place.

    With 2 layers and W = 192, for example, the inputs past_key_0, past_key_1, past_value_0 and past_value_1 (B, P, 192)
    become `past` (B, P, 768), in that order.
    """
    order = list(kv_tensor_names(layers, contract.new_key, contract.new_value))
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    pasts, news = [inputs[past] for past, _ in order], [outputs[new] for _, new in order]
    past = ir.Value(name=contract.PAST, type=pasts[0].type, shape=_stacked_shape(pasts))
    split = ir.node("Split", [past], attributes={"axis": -1, "num_outputs": len(pasts)}, num_outputs=len(pasts))
    graph.insert_before(graph[0], split)
    for part, value in zip(split.outputs, pasts, strict=True):
        part.type, part.shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, part)
        graph.inputs.remove(value)
    graph.inputs.append(past)
    dtype = news[0].dtype
    assert dtype is not None  # noqa: S101 -- the contract's
    new = insert(graph, graph[-1], "Concat", news, dtype, {"axis": -1})
    new.name, new.shape = contract.NEW, _stacked_shape(news)
    for value in news:
        graph.outputs.remove(value)
    graph.outputs.append(new)
    graph.sort()


def _stacked_shape(values: list[ir.Value]) -> ir.Shape:
    """Return the shape of values of one shape that are concatenated along the last axis."""
    shape = values[0].shape
    assert shape is not None and isinstance(shape[-1], int)  # noqa: S101 -- the contract's
    return ir.Shape([*shape[:-1], len(values) * shape[-1]])
