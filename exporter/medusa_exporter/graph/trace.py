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
from medusa_exporter.graph.step import StepModule
from medusa_exporter.library_logging import log_errors_only

if TYPE_CHECKING:
    from medusa_runtime.facts import ModelFacts
    from transformers import PreTrainedModel

    from medusa_exporter.heads.modules import MedusaHeads

OPSET = 23
FOLD_LIMIT = 512 * 512  # the exporter computes with constants of at most so many elements
# Example sizes, all different. None is 0 or 1: the tracer would treat such a size as fixed.
EXAMPLE = {"B": 3, "T": 5, "P": 7, "R": 4, "N": 2}


def trace(model: PreTrainedModel, heads: MedusaHeads | None, facts: ModelFacts, top_k: int) -> ir.Model:
    """Return the graph of one step.

    Its inputs and outputs are those of `medusa_runtime.contract`, in that order, with the symbolic dimensions B, T, P,
    R and N. Its weights are the torch tensors themselves, not copies.

    Args:
        model: The decoder, in fp32.
        heads: Its heads; None for a graph without a draft, which ignores `draft_hidden`.
        facts: The decoder's sizes.
        top_k: The number of candidates that each head proposes.
    """
    state = facts.hidden_size if heads is None else heads.input_size
    inputs = contract.input_specs(facts.layers, state, facts.kv_row)
    outputs = contract.output_specs(facts.layers, state, facts.vocab_size, facts.kv_row)
    release_memory()  # left over from loading
    graph, factor = _export(model, heads, inputs, outputs, top_k)
    release_memory()  # left over from the exporter
    clean_up(graph)
    apply_attention_factor(graph.graph, factor)
    declare_signature(graph, inputs, outputs)
    return graph


def _export(
    model: PreTrainedModel,
    heads: MedusaHeads | None,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    top_k: int,
) -> tuple[ir.Model, float]:
    """Return the exporter's graph, and the attention factor that its cosines and sines still lack."""
    layers = model.config.num_hidden_layers
    arguments = _group_layers(tuple(_example(spec) for spec in inputs), layers)
    dynamic = _group_layers(
        tuple(
            {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in inputs
        ),
        layers,
    )
    rows = _stand_in(model, heads)
    step = StepModule(model, heads, top_k, rows).eval()
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
        assert program is not None  # noqa: S101 -- never None with dynamo=True
        program.optimize()
    graph = program.model.clone()  # the original keeps references to values that it no longer has
    _drop_references(graph)
    if rows is not None and heads is not None and heads.token_map is not None:
        _replace_stand_in(graph, rows, model.get_output_embeddings().weight, heads.token_map)
    return graph, factor


def _stand_in(model: PreTrainedModel, heads: MedusaHeads | None) -> torch.Tensor | None:
    """Return a tensor in place of the lm_head's rows of a draft vocabulary, which would be a copy.

    The tensor is never written, so it occupies no memory; `_replace_stand_in` makes the graph read the rows lazily.
    None without a draft vocabulary, and if it is so small that the exporter may compute with it.
    """
    if heads is None or heads.token_map is None or heads.own_lm_head is not None:
        return None
    weight = model.get_output_embeddings().weight
    rows = torch.empty(heads.token_map.numel(), weight.shape[1], dtype=weight.dtype)
    return rows if rows.numel() > FOLD_LIMIT else None


def _replace_stand_in(graph: ir.Model, rows: torch.Tensor, weight: torch.Tensor, token_map: torch.Tensor) -> None:
    """Let the graph read the lm_head's rows of the draft vocabulary where it has the stand-in `rows`."""

    def stands_in(tensor: Any) -> bool:
        raw = getattr(tensor, "raw", None)
        return isinstance(raw, torch.Tensor) and raw.data_ptr() == rows.data_ptr()

    [value] = [one for one in graph.graph.initializers.values() if stands_in(one.const_value)]
    value.const_value = SelectedRows(weight, token_map, str(value.name))


def _drop_references(model: ir.Model) -> None:
    """Drop references from nodes and values to the exported program, which would otherwise live as long as they do."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        graph.meta.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.meta.clear()
        for node in graph:
            node.meta.clear()
            for value in node.outputs:
                value.meta.clear()


def _group_layers(per_input: tuple[object, ...], layers: int) -> tuple[object, ...]:
    """Arrange one item per input as the arguments of `Step.forward`: past keys and past values become lists."""
    singles = len(per_input) - 2 * layers
    return (*per_input[:singles], list(per_input[singles : singles + layers]), list(per_input[singles + layers :]))


def _example(spec: TensorSpec) -> torch.Tensor:
    """Return an input of example size."""
    shape = [EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))
