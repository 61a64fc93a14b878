"""Checks a saved graph before it may enter a bundle: the ONNX checker, shape inference, declared against actual I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from medusa_runtime import contract
from medusa_runtime.backends.ort_library import find_library
from medusa_runtime.backends.tensorrt import PAST_UNIT
from medusa_runtime.contract import TensorSpec
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from onnx import helper

from medusa_exporter.engines.plan import StepSize

SIZES = {"B": 1, "T": 3, "P": PAST_UNIT, "C": 2 * PAST_UNIT, "R": 2}


def check_graph(path: Path, facts: ModelFacts, heads: HeadFacts, size: StepSize | None = None) -> None:
    """Raise RuntimeError (or onnx's own checker error) where the graph at `path` is not what the contract says.

    size: of the steps that it is fixed to, None where it takes any. It is run too, in ONNX Runtime's CPU provider, but
    for one in bf16, which that does not know.
    """
    onnx.checker.check_model(str(path), full_check=True)
    given = onnx.load(path, load_external_data=False).graph.input
    shapes = {value.name: value.type.tensor_type for value in given}
    joined = contract.PAST in shapes
    past, state = shapes[contract.PAST if joined else contract.past_key(0)], state_size(facts, heads)
    dtype = helper.tensor_dtype_to_np_dtype(past.elem_type).name
    if joined:
        inputs, outputs = contract.together_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype)
    elif len(past.shape.dim) == 4:
        model = facts.layers, state, facts.vocab_size, facts.kv_heads, facts.head_dim
        inputs, outputs = contract.in_place_specs(*model, dtype, bound=contract.PAST_ROWS in shapes)
    else:
        inputs = contract.input_specs(facts.layers, state, facts.kv_row, dtype)
        outputs = contract.output_specs(facts.layers, state, facts.vocab_size, facts.kv_row, dtype)
    if size is not None:
        inputs, outputs = (tuple(_fixed(spec, size) for spec in specs) for specs in (inputs, outputs))
        inputs = tuple(spec for spec in inputs if size.draft or spec.name != contract.DRAFT_HIDDEN)
    elif contract.TREE_MASK not in shapes:
        inputs = tuple(spec for spec in inputs if spec.name not in contract.CAUSAL_LACKS)
    if dtype == "bfloat16":
        return
    session = _session(path)
    _declared(session.get_inputs(), inputs)
    _declared(session.get_outputs(), outputs)
    for drafts in (0, 1):
        sizes = {**SIZES, "N": drafts}
        results = session.run(None, {spec.name: np.zeros(_shape(spec, sizes), spec.dtype) for spec in inputs})
        for spec, result in zip(outputs, results, strict=True):
            if result.shape != _shape(spec, sizes) or result.dtype != spec.dtype:
                raise RuntimeError(
                    f"{path.name}: with N = {drafts}, output {spec.name!r} came as {result.dtype}{list(result.shape)}, "
                    f"expected {spec.dtype}{list(_shape(spec, sizes))}"
                )


def _fixed(spec: TensorSpec, size: StepSize) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, tuple(size.sizes.get(str(one), one) for one in spec.shape))


def _declared(values: Any, specs: tuple[TensorSpec, ...]) -> None:
    found = [(value.name, tuple(value.shape)) for value in values]
    expected = [(spec.name, spec.shape) for spec in specs]
    for got, wanted in zip(found, expected, strict=True):
        if got != wanted:
            raise RuntimeError(f"the graph declares {got}, the contract says {wanted}")


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def _session(path: Path) -> Any:
    """Load the graph with its weights left where they are on disk: this is a check, not a measurement."""
    onnxruntime = find_library("export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
