"""Fusions for ONNX Runtime: fewer, larger operators for what stays between the products.

Each operator costs some microseconds beside its work, and each product wakes the threads anew; with 8-bit and 4-bit
weights that is a good part of a step. Three rewrites, none of which changes what is computed:

- products of the same rows (queries, keys and values; gate and up) become one, its columns split afterwards;
- queries and keys are turned by one RotaryEmbedding;
- a residual sum and the norm of it become SkipSimplifiedLayerNormalization, ONNX Runtime's own operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from medusa_exporter.graph.quantise import DOMAIN
from medusa_exporter.graph.tidy import int64_constant, only_consumer, strip


def fuse(model: ir.Model) -> None:
    """Apply all three in place. Inputs and outputs keep their names."""
    graph = model.graph
    graph.opset_imports[DOMAIN] = 1
    together: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _constant(node.inputs[1], rank=2) is not None:
            together[node.inputs[0]].append(node)
    for nodes in together.values():
        if len(nodes) > 1:
            _turn_together(graph, _pack(graph, nodes))
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _norm_the_sum(graph, node)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()  # the angles are computed behind the first product
    strip(model)


def _pack(graph: ir.Graph, nodes: Sequence[ir.Node]) -> ir.Node:
    """Make one product, with one sum of all biases if each product has a bias; return the Split behind it."""
    rows, first = nodes[0].inputs[0], nodes[0]
    assert rows is not None  # noqa: S101 -- `fuse` has looked
    product = _add(graph, first, "MatMul", [rows, _side_by_side(graph, [node.inputs[1] for node in nodes])])
    biases = [_bias(node) for node in nodes]
    ends = [node.outputs[0] for node in nodes]
    if None not in biases:
        product = _add(graph, first, "Add", [product, _side_by_side(graph, biases)])
        ends = [next(iter(end.consumers())).outputs[0] for end in ends]
    return _split(graph, first, product, ends)


def _turn_together(graph: ir.Graph, split: ir.Node) -> None:
    """Split -> two RotaryEmbeddings of the first two parts becomes one RotaryEmbedding, split afterwards."""
    parts = split.outputs
    turned = [only_consumer(part, "RotaryEmbedding") for part in parts[:2]]
    queries, keys = turned if len(turned) == 2 else (None, None)
    if queries is None or keys is None or list(queries.inputs[1:]) != list(keys.inputs[1:]):
        return
    heads = [rope.attributes["num_heads"].as_int() for rope in (queries, keys)]
    widths = [_width(part) for part in parts]
    if widths[0] * heads[1] != widths[1] * heads[0]:
        return
    product = split.inputs[0]
    assert product is not None  # noqa: S101 -- `_pack` has made it
    first, rest = _parts(graph, split, product, [widths[0] + widths[1], *widths[2:]])
    attributes: dict[str, ir.Attr | int] = {**queries.attributes, "num_heads": sum(heads)}
    both = _add(graph, split, "RotaryEmbedding", [first, *queries.inputs[1:]], attributes)
    _split(graph, split, both, [queries.outputs[0], keys.outputs[0]])
    for part, value in zip(parts[2:], rest, strict=True):
        _replace(part, value)


def _norm_the_sum(graph: ir.Graph, norm: ir.Node) -> None:
    """Add -> RMSNormalization becomes one operator that gives both the norm and the sum."""
    total, gain = norm.inputs[0], norm.inputs[1]
    add = None if total is None else total.producer()
    if add is None or add.op_type != "Add" or total is None or total.is_graph_output():
        return
    if any(value is None or value.shape is None or value.shape.rank() != 3 for value in add.inputs):
        return
    if _axis(norm) not in (-1, 2) or _constant(gain, rank=1) is None:
        return
    epsilon = norm.attributes["epsilon"] if "epsilon" in norm.attributes else ir.AttrFloat32("epsilon", 1e-5)
    new = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, gain],
        attributes={"epsilon": epsilon.as_float()},
        domain=DOMAIN,
        num_outputs=4,
        name=f"{norm.name}_sum",
    )
    for index, like in ((0, norm.outputs[0]), (3, total)):
        new.outputs[index].name = f"{like.name}_fused"
        new.outputs[index].type, new.outputs[index].shape = like.type, like.shape
    for index in (1, 2):  # mean and deviation, which nobody asks for
        new.outputs[index].name = ""
    graph.insert_before(add, new)
    _replace(norm.outputs[0], new.outputs[0])
    _replace(total, new.outputs[3])


def _axis(norm: ir.Node) -> int:
    return norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1


def _bias(product: ir.Node) -> ir.Value | None:
    """The vector that is all that is done to a product: product + bias."""
    add = only_consumer(product.outputs[0], "Add")
    if add is None or product.outputs[0].is_graph_output():
        return None
    other = add.inputs[1] if add.inputs[0] is product.outputs[0] else add.inputs[0]
    return None if _constant(other, rank=1) is None else other


def _side_by_side(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """Constants next to each other along their last axis; joined when they are read, so that no copy is held."""
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    name = "|".join(value.name or "" for value in values if value is not None)
    shape = (*tensors[0].shape.numpy()[:-1], sum(tensor.shape.numpy()[-1] for tensor in tensors))

    def join() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name)

    joined = ir.LazyTensor(join, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(joined.dtype), shape=joined.shape, const_value=joined)
    graph.register_initializer(value)
    return value


def _split(graph: ir.Graph, before: ir.Node, joined: ir.Value, ends: Sequence[ir.Value]) -> ir.Node:
    """Split `joined` along its last axis into what takes the place of `ends`."""
    first, rest = _parts(graph, before, joined, [_width(end) for end in ends])
    for end, part in zip(ends, (first, *rest), strict=True):
        _replace(end, part)
    node = first.producer()
    assert node is not None  # noqa: S101 -- it has just been made
    return node


def _parts(
    graph: ir.Graph, before: ir.Node, joined: ir.Value, widths: Sequence[int]
) -> tuple[ir.Value, Sequence[ir.Value]]:
    """Split `joined` along its last axis, in front of a node: the first part and the others."""
    name = f"{joined.name}_in_{len(widths)}"
    sizes = int64_constant(graph, name, list(widths))
    node = ir.node("Split", [joined, sizes], attributes={"axis": -1}, num_outputs=len(widths), name=name)
    for index, (part, width) in enumerate(zip(node.outputs, widths, strict=True)):
        part.name, part.type = f"{name}_{index}", joined.type
        part.shape = None if joined.shape is None else ir.Shape([*joined.shape[:-1], width])
    graph.insert_before(before, node)
    return node.outputs[0], node.outputs[1:]


def _add(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, ir.Attr | int] | None = None,
) -> ir.Value:
    """Put a node in front of another whose rows its own are like; return what it gives."""
    rows, last = inputs[0], inputs[1]
    assert rows is not None and rows.shape is not None and last is not None  # noqa: S101
    name = f"{before.name}_{op_type}"
    new = ir.node(op_type, inputs, attributes=attributes, name=name)
    value = new.outputs[0]
    value.name, value.type = f"{name}_all", rows.type
    widest = last.shape[-1] if op_type == "MatMul" and last.shape is not None else rows.shape[-1]
    value.shape = ir.Shape([*rows.shape[:-1], widest])
    graph.insert_before(before, new)
    return value


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Put `new` wherever `old` was used; an output of the graph keeps its name and shape."""
    if old.is_graph_output():
        old.name, new.name, new.shape = f"{old.name}_before", old.name, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _constant(value: ir.Value | None, rank: int) -> ir.TensorProtocol | None:
    tensor = None if value is None else value.const_value
    return tensor if tensor is not None and len(tensor.shape) == rank else None


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)  # noqa: S101 -- a product with a constant has a known width
    return width
