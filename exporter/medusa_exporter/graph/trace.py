"""Traces a decoder with its heads into one ONNX graph of few, fused standard operators (opset 23)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from medusa_runtime import contract
from medusa_runtime.contract import TensorSpec

from medusa_exporter.graph.cleanup import clean_up, declare_signature
from medusa_exporter.graph.lazy_weights import SelectedRows
from medusa_exporter.graph.memory import release_memory
from medusa_exporter.graph.rotary_scaling import apply_attention_factor, without_attention_factor
from medusa_exporter.graph.step import Step
from medusa_exporter.library_logging import log_errors_only

if TYPE_CHECKING:
    from medusa_runtime.facts import ModelFacts
    from transformers import PreTrainedModel

    from medusa_exporter.heads.modules import MedusaHeads

OPSET = 23
FOLD_LIMIT = 512 * 512  # numbers in a constant that the exporter may compute with
# Example sizes, pairwise different where the dimensions are: none is 0 or 1, which the tracer would take as fixed.
EXAMPLE = {"B": 3, "T": 5, "P": 7, "R": 4, "N": 2}


def trace(model: PreTrainedModel, heads: MedusaHeads, facts: ModelFacts, top_k: int) -> ir.Model:
    """Return the graph of one step; its weights are the torch tensors themselves, not copies.

    Inputs and outputs are those of `medusa_runtime.contract`, in that order, with the symbolic dimensions B, T, P, R
    and N. `top_k` candidates are kept per head.
    """
    inputs = contract.input_specs(facts.layers, heads.input_size, facts.kv_row)
    outputs = contract.output_specs(facts.layers, heads.input_size, facts.vocab_size, facts.kv_row)
    release_memory()  # what loading has left
    graph, factor = _exported(model, heads, inputs, outputs, top_k)
    release_memory()  # what the exporter has left
    clean_up(graph)
    apply_attention_factor(graph.graph, factor)
    declare_signature(graph, inputs, outputs)
    return graph


def _exported(
    model: PreTrainedModel,
    heads: MedusaHeads,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    top_k: int,
) -> tuple[ir.Model, float]:
    """Return the exporter's graph, and the factor that cosines and sines of its rope still lack."""
    layers = model.config.num_hidden_layers
    arguments = _group(tuple(_example(spec) for spec in inputs), layers)
    dynamic = _group(
        tuple(
            {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in inputs
        ),
        layers,
    )
    rows = _stand_in(model, heads)
    step = Step(model, heads, top_k, rows).eval()
    with torch.no_grad(), log_errors_only("torch.onnx"), without_attention_factor(model) as factor:
        program = torch.onnx.export(
            step,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            verbose=False,
            optimize=False,
        )
        assert program is not None  # noqa: S101 -- it is when dynamo=True
        program.optimize()
    graph = program.model.clone()  # a graph remembers values that it no longer has
    _forget_origin(graph)
    if rows is not None and heads.token_map is not None:
        _replace_stand_in(graph, rows, model.get_output_embeddings().weight, heads.token_map)
    return graph, factor


def _stand_in(model: PreTrainedModel, heads: MedusaHeads) -> torch.Tensor | None:
    """Return memory that nobody touches, and that thus takes none, for the lm_head's rows of a draft vocabulary.

    A copy of the rows is only made when they are written. None without a draft vocabulary and for one so small that the
    exporter may compute with it.
    """
    if heads.token_map is None or heads.own_lm_head is not None:
        return None
    weight = model.get_output_embeddings().weight
    rows = torch.empty(heads.token_map.numel(), weight.shape[1], dtype=weight.dtype)
    return rows if rows.numel() > FOLD_LIMIT else None


def _replace_stand_in(graph: ir.Model, rows: torch.Tensor, weight: torch.Tensor, token_map: torch.Tensor) -> None:
    def stands_in(tensor: Any) -> bool:
        raw = getattr(tensor, "raw", None)
        return isinstance(raw, torch.Tensor) and raw.data_ptr() == rows.data_ptr()

    [value] = [one for one in graph.graph.initializers.values() if stands_in(one.const_value)]
    value.const_value = SelectedRows(weight, token_map, str(value.name))


def _forget_origin(model: ir.Model) -> None:
    """Drop what nodes and values know of the program that they were made from: it would live as long as they do."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        graph.meta.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.meta.clear()
        for node in graph:
            node.meta.clear()
            for value in node.outputs:
                value.meta.clear()


def _group(per_input: tuple[object, ...], layers: int) -> tuple[object, ...]:
    """Lay per-input things out as Step.forward takes them: the pasts as two lists."""
    singles = len(per_input) - 2 * layers
    return (*per_input[:singles], list(per_input[singles : singles + layers]), list(per_input[singles + layers :]))


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))
