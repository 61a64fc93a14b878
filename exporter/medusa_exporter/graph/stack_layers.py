"""One input for all past rows, one output for all new ones: TensorRT's dialect of the contract.

With some hundred inputs and outputs TensorRT 8.6 turns each of them into fp32 and back, though both sides are fp16.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract
from medusa_runtime.backends.kv_arena import kv_tensor_names

from medusa_exporter.graph.edit import insert


def stack_layers(graph: ir.Graph, layers: int) -> None:
    """Put `past` and `new` (`contract.stacked_specs`) in the place of each layer's own rows, in place."""
    order = list(kv_tensor_names(layers, contract.new_key, contract.new_value))
    given, made = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    pasts, news = [given[past] for past, _ in order], [made[new] for _, new in order]
    past = ir.Value(name=contract.PAST, type=pasts[0].type, shape=_side_by_side(pasts))
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
    new.name, new.shape = contract.NEW, _side_by_side(news)
    for value in news:
        graph.outputs.remove(value)
    graph.outputs.append(new)
    graph.sort()


def _side_by_side(values: list[ir.Value]) -> ir.Shape:
    """The shape of all of these, which are of one shape, joined along the last axis."""
    shape = values[0].shape
    assert shape is not None and isinstance(shape[-1], int)  # noqa: S101 -- the contract's
    return ir.Shape([*shape[:-1], len(values) * shape[-1]])
