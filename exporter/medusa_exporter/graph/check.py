"""Checks a saved graph before it may enter a bundle: the ONNX checker, shape inference, declared against actual I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from medusa_runtime import contract
from medusa_runtime.contract import TensorSpec
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size

SIZES = {"T": 3, "C": 8, "R": 2}


def check_graph(path: Path, facts: ModelFacts, heads: HeadFacts) -> None:
    """Raise RuntimeError (or onnx's own checker error) where the graph at `path` is not what the contract says."""
    onnx.checker.check_model(str(path), full_check=True)
    session = _session(path)
    size = state_size(facts, heads)
    inputs, outputs = contract.in_place_specs(facts.layers, size, facts.vocab_size, facts.kv_heads, facts.head_dim)
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
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
