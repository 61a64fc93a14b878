"""Checks what a saved graph declares before it may enter a bundle: the ONNX checker, shape inference, the contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from medusa_runtime import contract
from medusa_runtime.contract import TensorSpec
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from onnx import ValueInfoProto, helper

from medusa_exporter.engines.step_sizes import StepSize


@dataclass(frozen=True)
class SavedGraph:
    """A saved graph whose inputs and outputs are the contract's, in its order.

    dtype: of keys and values. size: of the steps that it is fixed to, None where it takes any.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: str
    size: StepSize | None = None

    @property
    def input_names(self) -> frozenset[str]:
        """The names of its inputs."""
        return frozenset(spec.name for spec in self.inputs)


def check_saved_graph(path: Path, facts: ModelFacts, heads: HeadFacts, size: StepSize | None = None) -> SavedGraph:
    """Return what the graph at `path` declares.

    size: of the steps that it is fixed to, None where it takes any. Raises RuntimeError, or onnx's own checker error,
    where it is not what the contract says.
    """
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {value.name: value.type.tensor_type for value in graph.input}
    joined = contract.PAST in shapes
    past, state = shapes[contract.PAST if joined else contract.past_key(0)], state_size(facts, heads)
    dtype = helper.tensor_dtype_to_np_dtype(past.elem_type).name
    if joined:
        inputs, outputs = contract.stacked_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype)
    elif len(past.shape.dim) == 4:
        model = facts.layers, state, facts.vocab_size, facts.kv_heads, facts.head_dim
        inputs, outputs = contract.in_place_specs(*model, dtype, with_past_rows=contract.PAST_ROWS in shapes)
    else:
        inputs = contract.input_specs(facts.layers, state, facts.kv_row, dtype)
        outputs = contract.output_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype)
    if size is not None:
        inputs, outputs = (tuple(_fixed(spec, size) for spec in specs) for specs in (inputs, outputs))
        inputs = tuple(spec for spec in inputs if size.draft or spec.name != contract.DRAFT_HIDDEN)
    elif contract.TREE_MASK not in shapes:
        inputs = tuple(spec for spec in inputs if spec.name not in contract.CAUSAL_OMITTED_INPUTS)
    for values, specs in ((graph.input, inputs), (graph.output, outputs)):
        for got, wanted in zip(map(_spec, values), specs, strict=True):
            if got != wanted:
                raise RuntimeError(f"{path.name} declares {got}, the contract says {wanted}")
    return SavedGraph(path, inputs, outputs, dtype, size)


def _fixed(spec: TensorSpec, size: StepSize) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, tuple(size.sizes.get(str(one), one) for one in spec.shape))


def _spec(value: ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(one.dim_param or one.dim_value for one in kind.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)
