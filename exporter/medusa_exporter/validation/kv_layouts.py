"""The forms in which graphs read the past and give new keys and values: a tensor a layer, one for all, or in place.

Around the real rows lie rows of garbage: a graph that reads one of them gives other numbers than the model.

Shapes: B sequences of a step, all over the same past, P real rows of the past, T nodes, C rows of a buffer, L layers,
W elements of one token's keys of one layer.
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

UNSEEN = 3  # rows of garbage behind the real rows of the past, at least
GARBAGE = 50.0  # its standard deviation


class KvLayout(Protocol):
    """Runs a session over a past."""

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        """Run a step whose other inputs are given.

        Return its other outputs by name, and the new rows (B, 2 · L, T, W): keys of all layers, then values.
        """


def kv_layout(graph: SavedGraph, onnxruntime: Any) -> KvLayout:
    """Return the form of a graph."""
    names = {spec.name for spec in graph.outputs}
    if contract.NEW in names:
        return _Together(graph)
    return _Apart(graph) if contract.new_key(0) in names else _InPlace(graph, onnxruntime)


class _Apart:
    """(1, P and garbage, W) a layer, read only; new rows come as outputs of their own."""

    def __init__(self, graph: SavedGraph) -> None:
        self._dtype = graph.dtype
        self._pasts = [spec.name for spec in graph.inputs if spec.name.startswith("past_") and len(spec.shape) == 3]
        self._news = [name.replace("past_", "new_") for name in self._pasts]
        self._others = [spec.name for spec in graph.outputs if spec.name not in self._news]

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        pasts = zip(self._pasts, _layers(past), strict=True)
        B = len(inputs[contract.INPUT_IDS])
        given = {name: _repeated(_in_units(rows), B).astype(self._dtype) for name, rows in pasts}
        results = session.run([*self._others, *self._news], {**inputs, **given})
        others = dict(zip(self._others, results, strict=False))
        return others, np.stack(results[len(others) :], axis=1)


class _Together:
    """(1, P and garbage, 2 · L · W): a token's keys of all layers, then its values; read only."""

    def __init__(self, graph: SavedGraph) -> None:
        self._dtype = graph.dtype
        self._others = [spec.name for spec in graph.outputs if spec.name != contract.NEW]

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        layers = _layers(past)
        rows = _in_units(np.concatenate(list(layers), axis=1))
        rows = _repeated(rows, len(inputs[contract.INPUT_IDS])).astype(self._dtype)
        *others, new = session.run([*self._others, contract.NEW], {**inputs, contract.PAST: rows})
        return dict(zip(self._others, others, strict=True)), np.stack(np.split(new, len(layers), axis=2), axis=1)


class _InPlace:
    """(1, kv_heads, C, head_dim) a layer: a buffer that is input and output, new rows behind the P real ones."""

    def __init__(self, graph: SavedGraph, onnxruntime: Any) -> None:
        self._dtype, self._name, self._ort = graph.dtype, graph.path.name, onnxruntime
        self._pasts = {spec.name: spec.shape for spec in graph.inputs if len(spec.shape) == 4}
        self._others = [spec.name for spec in graph.outputs if len(spec.shape) != 4]
        self._bound = contract.PAST_ROWS in {spec.name for spec in graph.inputs}

    def run(self, session: Any, inputs: dict[str, Array], past: Past) -> tuple[dict[str, Array], Array]:
        P, T = past.length, inputs[contract.INPUT_IDS].shape[1]
        C = P + UNSEEN + T + contract.SPARE_ROWS
        if self._bound:
            inputs = {**inputs, contract.PAST_ROWS: np.arange(P + UNSEEN, dtype=np.int32)}
        binding, buffers, before = session.io_binding(), [], []
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        for name in self._others:
            binding.bind_output(name)
        for (name, shape), rows in zip(self._pasts.items(), _layers(past), strict=True):
            split = _with_garbage(rows, C - P).reshape(C, int(shape[1]), int(shape[3]))
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
                    f"{self._name} overwrites rows of {name!r} that earlier steps have kept, expected new rows behind "
                    "them; report this together with the model's name"
                )
        rows = np.stack([one[0, :, P : P + T].transpose(1, 0, 2).reshape(T, -1) for one in after])
        return dict(zip(self._others, others, strict=True)), rows[None]


def _layers(past: Past) -> FloatArray:
    """(2 · L, P, W): keys of all layers, then values."""
    return np.concatenate((past.keys, past.values))


def _repeated(rows: FloatArray, count: int) -> FloatArray:
    """(P, W) -> (count, P, W)."""
    return np.repeat(rows[None], count, axis=0)


def _in_units(rows: FloatArray) -> FloatArray:
    """Pad (P, W) with garbage: UNSEEN rows at least, up to the next multiple of PAST_MULTIPLE that TensorRT needs."""
    return _with_garbage(rows, UNSEEN + -(len(rows) + UNSEEN) % PAST_MULTIPLE)


def _with_garbage(rows: FloatArray, count: int) -> FloatArray:
    """Put `count` rows behind (P, W), the same each time."""
    garbage = np.random.default_rng(0).normal(scale=GARBAGE, size=(count, rows.shape[1]))
    return np.concatenate((rows, garbage.astype(np.float32)))
