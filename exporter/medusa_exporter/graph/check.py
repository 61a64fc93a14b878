"""Checks a saved graph before it may enter a bundle: ONNX checker, shape inference, and the contract's signature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from medusa_runtime import contract
from medusa_runtime.contract import TensorSpec
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from onnx import ValueInfoProto, helper

from medusa_exporter.engines.step_sizes import StepSize

Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # inputs and outputs


@dataclass(frozen=True)
class SavedGraph:
    """A saved graph whose inputs and outputs were checked against the contract.

    Attributes:
        path: The graph's file.
        inputs: All inputs, in order.
        outputs: All outputs, in order.
        dtype: The type of keys and values.
        size: The only step size that the graph accepts; None if it accepts any.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: str
    size: StepSize | None = None

    @property
    def input_names(self) -> frozenset[str]:
        """The names of all inputs."""
        return frozenset(spec.name for spec in self.inputs)


def check_saved_graph(path: Path, facts: ModelFacts, heads: HeadFacts, size: StepSize | None = None) -> SavedGraph:
    """Check the graph at `path` and return its signature.

    Args:
        path: The graph's file.
        facts: The decoder's sizes.
        heads: The heads' sizes.
        size: The only step size that the graph accepts; None if it accepts any.

    Raises:
        RuntimeError: The graph's inputs or outputs differ from the contract. onnx's checker raises its own errors.
    """
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type for value in graph.input}
    past = types[contract.PAST if contract.PAST in types else contract.past_key(0)]
    dtype = helper.tensor_dtype_to_np_dtype(past.elem_type).name
    inputs, outputs = _contract_signature(frozenset(types), len(past.shape.dim), facts, heads, dtype)
    if size is not None:
        inputs, outputs = (tuple(_freeze(spec, size) for spec in specs) for specs in (inputs, outputs))
        inputs = tuple(spec for spec in inputs if size.draft or spec.name != contract.DRAFT_HIDDEN)
    elif contract.TREE_MASK not in types:
        inputs = tuple(spec for spec in inputs if spec.name not in contract.CAUSAL_OMITTED_INPUTS)
    for values, specs in ((graph.input, inputs), (graph.output, outputs)):
        for declared, expected in zip(map(_spec, values), specs, strict=True):
            if declared != expected:
                raise RuntimeError(f"{path.name} declares {declared}, expected {expected} as in the contract")
    return SavedGraph(path, inputs, outputs, dtype, size)


def _contract_signature(
    names: frozenset[str], past_rank: int, facts: ModelFacts, heads: HeadFacts, dtype: str
) -> Signature:
    """Return the contract's signature in the form that a graph with these inputs has."""
    state = state_size(facts, heads)
    if contract.PAST in names:
        return contract.stacked_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype)
    if past_rank == 4:
        sizes = facts.layers, state, facts.vocab_size, facts.kv_heads, facts.head_dim
        return contract.in_place_specs(*sizes, dtype, gpu=contract.PAST_ROWS in names)
    return (
        contract.input_specs(facts.layers, state, facts.kv_row, dtype, summaries=True),  # a graph for a GPU
        contract.output_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype, summaries=True),
    )


def _freeze(spec: TensorSpec, size: StepSize) -> TensorSpec:
    """Replace the symbolic dimensions that a step size fixes."""
    return TensorSpec(spec.name, spec.dtype, tuple(size.sizes.get(str(one), one) for one in spec.shape))


def _spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(one.dim_param or one.dim_value for one in tensor.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)
