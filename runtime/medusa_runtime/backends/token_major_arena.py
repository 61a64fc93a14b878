"""Keys and values of all layers side by side, a token a row: what TensorRT's engines read and write.

One arena (B, capacity, 2 · layers · W) is the past, another (B, T, 2 · layers · W) what a step gives: a run of kept
rows of one sequence is one piece of memory.
"""

from __future__ import annotations

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Memory
from medusa_runtime.backends.kv_arena import LayerMajorArena, Tensor
from medusa_runtime.facts import ModelFacts


class TokenMajorArena(LayerMajorArena):
    """The arenas of one backend as one tensor each, whose rows hold every layer's."""

    def tensors(self, P: int, T: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a step of T nodes reads, the first P rows of the past, and the new rows that it gives."""
        kind, (_, width) = self._element.onnx, self._layout(self._model)
        past = Tensor(kind, (self.batch, P, width), self._past.address)
        return {contract.PAST: past}, {contract.NEW: Tensor(kind, (self.batch, T, width), self._new.address)}

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return (2 · layers, B, nodes, W): the rows that the last step gave."""
        rows = super().read_new(nodes, length)
        layers = rows.reshape(self.batch, nodes, 2 * self._model.layers, self._model.kv_row)
        new: FloatArray = layers.transpose(2, 0, 1, 3)
        return new

    def _layout(self, model: ModelFacts) -> tuple[int, int]:
        return 1, 2 * model.layers * model.kv_row

    def _copy(self, to: int, source: Memory, first: int, rows: int, count: int) -> None:  # noqa: ARG002
        """Row by row: no pitch may be beyond 2 GiB, and all rows of a sequence may be more."""
        row = self._row
        self._device.copy_rows(self._past.address + to * row, row, source.address + first * row, row, row, count)
