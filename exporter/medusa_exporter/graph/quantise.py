"""Quantises weights: matrix multiplications by a weight become ONNX Runtime's MatMulNBits.

Each block of a weight's column has its own scale, and inside the operator so has each block of a row of activations
(accuracy level 4: products of 8-bit integers). So rows stay independent of each other: a node's logits depend on its
ancestors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from medusa_runtime.contract import TOKENS
from medusa_runtime.errors import UnsupportedModelError
from onnx_ir.passes import common

from medusa_exporter.graph.calibration import Ranges
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, int_attribute
from medusa_exporter.graph.grouped_queries import group_queries
from medusa_exporter.graph.integer_matmul import use_integer_matmuls
from medusa_exporter.graph.nbits_weight import NBitsWeight
from medusa_exporter.graph.vocabulary import embedding_lookups, lm_head, look_up_blocks, tie_similar
from medusa_exporter.graph.weight_columns import ReadColumns, read_columns, read_rows, read_stacked
from medusa_exporter.precisions import FIXED_SCALES, FORMATS, VOCABULARY, WeightFormat

ACCURACY_LEVEL = 4  # activations in 8 bits; lower levels compute in floats and are several times slower


def with_precision(model: ir.Model, precision: str, ranges: Ranges, tables: Mapping[str, NBitsWeight]) -> ir.Model:
    """Return a copy of a graph in a precision of FORMATS; it shares the tensors that do not change.

    Args:
        model: The CPU's graph in fp32.
        precision: fp32, int8, w8a8 or int4.
        ranges: The ranges of activations, for precisions of FIXED_SCALES.
        tables: The graph's tables in 8 bits, from `quantised_tables`; graphs that are made with the same share them.
    """
    copy, to = model.clone(), FORMATS[precision]
    if precision in FIXED_SCALES:
        use_integer_matmuls(copy, ranges)
    if to is not None:
        if to.bits < VOCABULARY.bits:
            tie_similar(copy.graph)
        quantise_vocabulary(copy, tables)
        quantise(copy, to)
    group_queries(copy)
    return copy


def quantised_tables(graph: ir.Graph) -> dict[str, NBitsWeight]:
    """Return the embedding and the lm_head in 8 bits, by the name of the table (V, H); it is one if they are tied."""
    head = lm_head(graph)
    values = [node.inputs[0] for node in embedding_lookups(graph)]
    if head is not None and int_attribute(head, "transB"):
        values.append(head.inputs[1])
    tables = {}
    for value in values:
        tensor = None if value is None else value.const_value
        assert tensor is not None  # noqa: S101 -- `vocabulary` returns nodes with constant tables only
        V, H = tensor.shape.numpy()
        tables[_name(value)] = NBitsWeight(read_rows(tensor), (H, V), VOCABULARY, _name(value))
    return tables


def quantise_vocabulary(model: ir.Model, tables: Mapping[str, NBitsWeight]) -> ir.Model:
    """Quantise the embedding and the lm_head, in place; where they are one table, they stay one.

    Args:
        model: The graph. An lm_head that is no MatMul or Gemm any more stays as it is.
        tables: The graph's tables, from `quantised_tables`.
    """
    graph = model.graph
    head, lookups = lm_head(graph), embedding_lookups(graph)
    if head is not None and (table := tables.get(_name(head.inputs[1]))) is not None:
        for tensor in (table.packed, table.scales):
            constant(graph, str(tensor.name), tensor)  # `_operands` would make the same again, under the same name
    if lookups:
        table = tables[_name(lookups[0].inputs[0])]
        look_up_blocks(graph, lookups, table.packed, table.scales, VOCABULARY)
    return _quantise(model, [head] if head is not None else [], VOCABULARY)


def quantise_heads(model: ir.Model, to: WeightFormat) -> ir.Model:
    """Quantise the weights of the Medusa heads, in place, but for an lm_head that they share."""
    return _quantise(model, [node for node in draft_nodes(model) if node.op_type != "Gemm"], to)


def quantise_draft(model: ir.Model, to: WeightFormat) -> ir.Model:
    """Quantise the weights of the draft, in place: those that the output `tokens` is computed from."""
    return _quantise(model, draft_nodes(model), to)


def draft_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the draft, in the graph's order, so that builds give equal files."""
    draft = _ancestors(value for value in model.graph.outputs if value.name == TOKENS)
    return [node for node in model.graph if node in draft]


def quantise(model: ir.Model, to: WeightFormat) -> ir.Model:
    """Quantise the weights of every MatMul and Gemm, in place; rows that are looked up stay as they are."""
    return _quantise(model, model.graph, to)


def _quantise(model: ir.Model, nodes: Iterable[ir.Node], to: WeightFormat) -> ir.Model:
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    for node in list(nodes):
        _quantise_node(graph, node, to)
    common.RemoveUnusedNodesPass()(model)
    return model


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    """Return all nodes that the values are computed from."""
    found: set[ir.Node] = set()
    queue = [value.producer() for value in values]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found.add(node)
            queue += [other.producer() for other in node.inputs if other is not None]
    return found


def _quantise_node(graph: ir.Graph, node: ir.Node, to: WeightFormat) -> None:
    """Quantise a node if it is a multiplication by a constant weight."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.const_value is None:
        return
    if node.op_type == "Gemm":
        _quantise_gemm(graph, node, weight, to)
    elif weight.const_value.shape.rank() == 3:
        _quantise_stack(graph, node, weight, to)
    else:
        _become(node, "MatMulNBits", *_operands(graph, node.inputs[0], *read_columns(node), weight.name, to))


def _quantise_gemm(graph: ir.Graph, node: ir.Node, weight: ir.Value, to: WeightFormat) -> None:
    """Quantise rows @ W.T + bias, as `torch.nn.Linear` is exported."""
    inputs, attributes = _operands(graph, node.inputs[0], *read_columns(node), weight.name, to)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        _become(node, "MatMulNBits", inputs, attributes)
        return
    product = _insert_matmul(graph, node, inputs, attributes)
    _become(node, "Add", [product, bias], {}, domain="")


def _quantise_stack(graph: ir.Graph, node: ir.Node, weight: ir.Value, to: WeightFormat) -> None:
    """Quantise (1 or K, N, in) @ (K, in, out), the weights of K heads: one MatMulNBits each, as it has no batches."""
    assert weight.const_value is not None  # noqa: S101 -- `_quantise_node` has checked it
    rows, stack = node.inputs[0], weight.const_value
    count, *size = weight.const_value.shape.numpy()
    parts: list[ir.Value] = []
    if rows is None or rows.shape is None or rows.shape[0] not in (1, count):
        raise UnsupportedModelError(
            f"{weight.name}: {count} stacked weights and rows of shape {None if rows is None else rows.shape}, "
            f"expected 1 or {count} as their first size; build with --precision fp32"
        )
    if rows.shape[0] == count and count > 1:
        split = ir.node("Split", [rows], attributes={"axis": 0, "num_outputs": count}, num_outputs=count)
        for part in split.outputs:
            part.type, part.shape = rows.type, ir.Shape([1, *rows.shape[1:]])
        graph.insert_before(node, split)
        parts = list(split.outputs)
    results = []
    for k, part in enumerate(parts or [rows] * count):
        operands = _operands(graph, part, read_stacked(stack, k), (size[0], size[1]), f"{weight.name}.{k}", to)
        results.append(_insert_matmul(graph, node, *operands))
        results[-1].shape = None
    _become(node, "Concat", results, {"axis": 0}, domain="")


def _operands(
    graph: ir.Graph,
    rows: ir.Value | None,
    read: ReadColumns,
    shape: tuple[int, int],
    name: str | None,
    to: WeightFormat,
) -> tuple[Sequence[ir.Value | None], dict[str, int]]:
    """Add a quantised weight to the graph and return the inputs and attributes of its MatMulNBits."""
    weight = NBitsWeight(read, shape, to, str(name))
    operands = [rows, *(constant(graph, str(one.name), one) for one in (weight.packed, weight.scales))]
    size = {"K": shape[0], "N": shape[1]}
    return operands, {**size, "bits": to.bits, "block_size": to.block, "accuracy_level": ACCURACY_LEVEL}


def _insert_matmul(
    graph: ir.Graph, before: ir.Node, inputs: Sequence[ir.Value | None], attributes: dict[str, int]
) -> ir.Value:
    """Insert a MatMulNBits before a node and return its output."""
    new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=ORT_DOMAIN)
    new.outputs[0].type, new.outputs[0].shape = before.outputs[0].type, before.outputs[0].shape
    graph.insert_before(before, new)
    return new.outputs[0]


def _become(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int], domain: str = ORT_DOMAIN
) -> None:
    """Change a node's operator and inputs; its output, which may be one of the graph, keeps its name."""
    node.op_type, node.domain = op_type, domain
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes.add(ir.AttrInt64(name, number))


def _name(value: ir.Value | None) -> str:
    return str(None if value is None else value.name)
