"""One input for all past rows, one output for all new ones: TensorRT's dialect of the contract.

With some hundred inputs and outputs TensorRT 8.6 turns each of them into fp32 and back, though both sides are fp16.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract
from medusa_runtime.backends.arena import names

from medusa_exporter.graph.edit import insert


def together(graph: ir.Graph, layers: int) -> None:
    """Put `past` and `new` (`contract.together_specs`) in the place of each layer's own rows, in place."""
    order = list(names(layers, contract.new_key, contract.new_value))
    given, made = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    parts, rows = [given[past] for past, _ in order], [made[new] for _, new in order]
    past = _wide(contract.PAST, parts)
    split = ir.node("Split", [past], attributes={"axis": -1, "num_outputs": len(parts)}, num_outputs=len(parts))
    graph.insert_before(graph[0], split)
    for part, value in zip(split.outputs, parts, strict=True):
        part.type, part.shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, part)
        graph.inputs.remove(value)
    graph.inputs.append(past)
    wide = _wide(contract.NEW, rows)
    joined = insert(graph, graph[-1], "Concat", rows, ir.DataType.FLOAT, {"axis": -1})
    joined.name, joined.type, joined.shape = wide.name, wide.type, wide.shape
    for value in rows:
        graph.outputs.remove(value)
    graph.outputs.append(joined)
    graph.sort()


def _wide(name: str, values: list[ir.Value]) -> ir.Value:
    """A value as wide as all of these side by side."""
    first = values[0]
    assert first.shape is not None and isinstance(first.shape[-1], int)  # noqa: S101 -- the contract's
    return ir.Value(name=name, type=first.type, shape=ir.Shape([*first.shape[:-1], len(values) * first.shape[-1]]))
