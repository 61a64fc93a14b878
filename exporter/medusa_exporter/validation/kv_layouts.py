"""Runs graphs of each KV cache layout: one tensor per layer, one tensor for all layers, or buffers written in place.

The rows of the past are followed by rows of random values, so that a graph which reads beyond the past computes other
values than the model.

Shapes: B sequences of a step, all with the same past, P rows of the past, T nodes, C rows of a buffer, L layers, W
elements of a token's keys in a layer.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.tensorrt import PAST_MULTIPLE
from numpy.typing import NDArray

from medusa_exporter.graph.check import SavedGraph
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.steps import FloatArray, Past

Array = NDArray[Any]

EXTRA_ROWS = 3  # rows of random values after those of the past, at least
EXTRA_SCALE = 50.0  # standard deviation of the random values


class KvLayout(Protocol):
    """Runs a session with a past."""

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        """Run a step.

        Args:
            session: The ONNX Runtime session.
            inputs: All inputs but keys and values, by name.
            past: Keys and values of the tokens before the step.

        Returns:
            All outputs but keys and values, by name; and the new rows (B, 2 · L, T, W), keys of all layers first.
        """


def kv_layout(graph: SavedGraph, onnxruntime: Any) -> KvLayout:
    """Return the layout of a graph's KV cache."""
    names = {spec.name for spec in graph.outputs}
    if contract.NEW in names:
        return _SingleTensor(graph)
    return _TensorPerLayer(graph) if contract.new_key(0) in names else _InPlace(graph, onnxruntime)


class _TensorPerLayer:
    """A read-only input (1, P + extra rows, W) per layer; new rows are separate outputs."""

    def __init__(self, graph: SavedGraph) -> None:
        self._dtype = graph.dtype
        self._pasts = [spec.name for spec in graph.inputs if spec.name.startswith("past_") and len(spec.shape) == 3]
        self._news = [name.replace("past_", "new_") for name in self._pasts]
        self._others = [spec.name for spec in graph.outputs if spec.name not in self._news]

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        pasts = zip(self._pasts, _layers(past), strict=True)
        B = len(inputs[contract.INPUT_IDS])
        past_inputs = {name: _repeated(_whole_units(rows), B).astype(self._dtype) for name, rows in pasts}
        results = session.run([*self._others, *self._news], {**inputs, **past_inputs})
        others = dict(zip(self._others, results, strict=False))
        return others, np.stack(results[len(others) :], axis=1)


class _SingleTensor:
    """A read-only input (1, P + extra rows, 2 · L · W): a token's keys of all layers, then its values."""

    def __init__(self, graph: SavedGraph) -> None:
        self._dtype = graph.dtype
        self._others = [spec.name for spec in graph.outputs if spec.name != contract.NEW]

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        layers = _layers(past)
        rows = _whole_units(np.concatenate(list(layers), axis=1))
        rows = _repeated(rows, len(inputs[contract.INPUT_IDS])).astype(self._dtype)
        *others, new = session.run([*self._others, contract.NEW], {**inputs, contract.PAST: rows})
        return dict(zip(self._others, others, strict=True)), np.stack(np.split(new, len(layers), axis=2), axis=1)


class _InPlace:
    """A buffer (1, kv_heads, C, head_dim) per layer that is input and output; new rows follow those of the past."""

    def __init__(self, graph: SavedGraph, onnxruntime: Any) -> None:
        self._dtype, self._name, self._ort = graph.dtype, graph.path.name, onnxruntime
        self._pasts = {spec.name: spec.shape for spec in graph.inputs if len(spec.shape) == 4}
        self._others = [spec.name for spec in graph.outputs if len(spec.shape) != 4]
        self._has_past_rows = contract.PAST_ROWS in {spec.name for spec in graph.inputs}

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        P, T = past.length, inputs[contract.INPUT_IDS].shape[1]
        C = P + EXTRA_ROWS + T + contract.SPARE_ROWS
        if self._has_past_rows:
            inputs = {**inputs, contract.PAST_ROWS: np.arange(P + EXTRA_ROWS, dtype=np.int32)}
        binding, buffers, before = session.io_binding(), [], []
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        for name in self._others:
            binding.bind_output(name)
        for (name, shape), rows in zip(self._pasts.items(), _layers(past), strict=True):
            split = _with_extra_rows(rows, C - P).reshape(C, int(shape[1]), int(shape[3]))
            before.append(np.ascontiguousarray(split.transpose(1, 0, 2)[None].astype(self._dtype)))
            buffers.append(self._ort.OrtValue.ortvalue_from_numpy(before[-1].copy()))
            binding.bind_ortvalue_input(name, buffers[-1])
            binding.bind_ortvalue_output(name.replace("past_", "present_"), buffers[-1])
        session.run_with_iobinding(binding)
        others = [value.numpy() for value in binding.get_outputs()[: len(self._others)]]
        after = [buffer.numpy() for buffer in buffers]
        for name, old, new in zip(self._pasts, before, after, strict=True):
            if not np.array_equal(old[:, :, :P], new[:, :, :P]):
                raise GraphMismatchError(
                    f"{self._name} overwrites rows of {name!r} from earlier steps, expected new rows after "
                    "them; report this together with the model's name"
                )
        rows = np.stack([one[0, :, P : P + T].transpose(1, 0, 2).reshape(T, -1) for one in after])
        return dict(zip(self._others, others, strict=True)), rows[None]


def _layers(past: Past) -> FloatArray:
    """Return (2 · L, P, W): keys of all layers, then values."""
    return np.concatenate((past.keys, past.values))


def _repeated(rows: FloatArray, count: int) -> FloatArray:
    """Repeat (P, W) to (count, P, W)."""
    return np.repeat(rows[None], count, axis=0)


def _whole_units(rows: FloatArray) -> FloatArray:
    """Append EXTRA_ROWS rows or more to (P, W), up to the next multiple of PAST_MULTIPLE, as TensorRT requires."""
    return _with_extra_rows(rows, EXTRA_ROWS + -(len(rows) + EXTRA_ROWS) % PAST_MULTIPLE)


def _with_extra_rows(rows: FloatArray, count: int) -> FloatArray:
    """Append `count` rows of random values to (P, W), the same each time."""
    extra = np.random.default_rng(0).normal(scale=EXTRA_SCALE, size=(count, rows.shape[1]))
    return np.concatenate((rows, extra.astype(np.float32)))
