"""The KV arena with one row per token for all layers, which TensorRT's engines read and write."""

from __future__ import annotations

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import DeviceTensor
from medusa_runtime.backends.layer_major_arena import LayerMajorArena, TensorRows
from medusa_runtime.facts import ModelFacts


class TokenMajorArena(LayerMajorArena):
    """A past of shape (B, capacity, 2 · layers · W) and new rows of shape (B, T, 2 · layers · W).

    A row holds a token's keys of all layers, then its values of all layers. A run of consecutive nodes of one sequence
    is therefore contiguous in memory.

    Example: 2 layers, W = 4, float32, 2 sequences, a capacity of 6 rows and a step of 3 nodes. The past is (2, 6, 16)
    and the new rows are (2, 3, 16). `commit(1, [0, 1, 2], 3, nodes=3)` appends all 3 nodes of sequence 1 to its 3 rows:
    new rows 3, 4 and 5 go to past rows 9, 10 and 11, as one copy of 3 rows of 64 bytes.
    """

    def tensors(self, P: int, T: int) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
        """Return the first P rows of the past as the input, and the new rows as the output."""
        onnx_type, (_, width) = self._element.onnx_type, self._tensor_sizes(self._model)
        past = DeviceTensor(onnx_type, (self.batch, P, width), self._past.address)
        new = DeviceTensor(onnx_type, (self.batch, T, width), self._new.address)
        return {contract.PAST: past}, {contract.NEW: new}

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return the new rows of the last step: (2 · layers, B, nodes, W) float32."""
        rows = super().read_new(nodes, length)  # (1, B, nodes, 2 · layers · W)
        by_layer = rows.reshape(self.batch, nodes, 2 * self._model.layers, self._model.kv_row)
        new: FloatArray = by_layer.transpose(2, 0, 1, 3)
        return new

    def _tensor_sizes(self, model: ModelFacts) -> tuple[int, int]:
        return 1, 2 * model.layers * model.kv_row

    def _copy(self, to: TensorRows, source: TensorRows, count: int) -> None:
        """Copy rows one by one within a single 2-D copy, because CUDA limits the pitch and the width to 2 GiB."""
        row_bytes = self._row_bytes
        self._device.copy_rows(
            to=to.memory.address + to.first * row_bytes,
            to_pitch=row_bytes,
            source=source.memory.address + source.first * row_bytes,
            source_pitch=row_bytes,
            width=row_bytes,
            height=count,
        )
