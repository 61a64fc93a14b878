"""Pinned host memory for a step's inputs and its small outputs, which the device reads and writes directly."""

from __future__ import annotations

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import RowSummary, Step
from medusa_runtime.backends.device import Device, DeviceTensor
from medusa_runtime.backends.element_types import BOOL, FLOAT32, INT32
from medusa_runtime.backends.step_shape import StepShape

ALIGNMENT = 256  # bytes, of every array, as for device memory
_FLOAT = FLOAT32.onnx_type
_DTYPES = {INT32: np.dtype(np.int32), BOOL: np.dtype(np.bool_), _FLOAT: np.dtype(np.float32)}


class HostBuffers:
    """The inputs and the small outputs (`tokens`, `argmax`, summaries) of all steps of one shape.

    A step may be smaller than the shape that it runs in: `write` pads it, and the readers leave the padding out.
    """

    def __init__(self, device: Device, shape: StepShape, vocab_size: int) -> None:
        """Allocate the buffers for a shape.

        Args:
            device: Reads and writes them.
            shape: The shape.
            vocab_size: Number of logits of a row.

        Raises:
            CapacityError: The memory is not available.
        """
        B, T, R, S, K = shape.B, shape.T, shape.R, shape.S, contract.summary_tokens(vocab_size)
        inputs = {
            contract.INPUT_IDS: (INT32, (B, T)),
            contract.POSITION_IDS: (INT32, (B, T)),
            contract.TREE_MASK: (BOOL, (B, T, T)),
            contract.PAST_LENGTH: (INT32, (B,)),
            contract.LOGIT_ROWS: (INT32, (B, R)),
            contract.SUMMARY_ROWS: (INT32, (B, S)),
        }
        outputs = {
            contract.TOKENS: (INT32, (B, T)),
            contract.ARGMAX: (INT32, (B, R)),
            contract.TOP_IDS: (INT32, (B, S, K)),
            contract.TOP_LOGITS: (_FLOAT, (B, S, K)),
            contract.LOGSUMEXP: (_FLOAT, (B, S)),
            contract.FINITE: (BOOL, (B, R)),
        }
        offsets, end = {}, 0
        for name, (onnx_type, sizes) in (inputs | outputs).items():
            offsets[name] = end
            end += -(-_byte_count(onnx_type, sizes) // ALIGNMENT) * ALIGNMENT
        self._block = device.allocate_host(end)
        arrays, tensors = {}, {}
        for name, (onnx_type, sizes) in (inputs | outputs).items():
            start = offsets[name]
            flat = self._block.array[start : start + _byte_count(onnx_type, sizes)]
            arrays[name] = flat.view(_DTYPES[onnx_type]).reshape(sizes)
            tensors[name] = DeviceTensor(onnx_type, sizes, self._block.address + start)
        self.inputs = {name: tensors[name] for name in inputs}
        self.outputs = {name: tensors[name] for name in outputs}
        *self._input_arrays, summary_rows = (arrays[name] for name in inputs)
        summary_rows[:] = np.arange(S)  # all rows, in every step
        self._tokens, self._argmax = ([row.data for row in arrays[name]] for name in (contract.TOKENS, contract.ARGMAX))
        self._summaries = [arrays[name] for name in contract.SUMMARY_OUTPUTS]
        self._summarised = False  # whether the step written last asked for summaries
        self._capacity = (T, R)
        self.sizes = self._capacity  # nodes and rows with logits of the step written last, without padding

    def write(self, step: Step) -> None:
        """Copy the arrays of a step into the buffers.

        A step with fewer nodes is padded by literal tokens at the position behind the past that see only themselves,
        and one with fewer rows by its first row.
        """
        ids, positions, mask, past_length, rows = self._input_arrays
        sizes = T, R = step.input_ids.shape[1], step.logit_rows.shape[1]
        past_length[:] = step.past_length
        if sizes != self._capacity:
            positions[:] = step.past_length[:, None]
            if sizes != self.sizes:  # otherwise the padding of the previous step is still there
                ids[:], mask[:], rows[:] = 0, np.eye(self._capacity[0]), 0
        self.sizes, self._summarised = sizes, step.summaries
        ids[:, :T], positions[:, :T], mask[:, :T, :T] = step.input_ids, step.position_ids, step.tree_mask
        rows[:, :R] = step.logit_rows

    @property
    def past_length(self) -> int:
        """Rows of the past of the first sequence, in the step written last."""
        return int(self._input_arrays[3][0])

    def read_tokens(self, sequence: int) -> list[int]:
        """Return the ids of the T nodes."""
        ids: list[int] = self._tokens[sequence].tolist()
        return ids[: self.sizes[0]]

    def read_argmax(self, sequence: int) -> list[int]:
        """Return the greedy next ids of the R rows."""
        ids: list[int] = self._argmax[sequence].tolist()
        return ids[: self.sizes[1]]

    def read_summary(self, row: int, sequence: int) -> RowSummary | None:
        """Return the summary of one row; None if the step did not ask for summaries."""
        if not self._summarised:
            return None
        finite, ids, logits, logsumexp = self._summaries
        return RowSummary(
            ids[sequence, row], logits[sequence, row], float(logsumexp[sequence, row]), bool(finite[sequence, row])
        )

    def read_finite(self, row: int, sequence: int) -> bool:
        """Return whether all logits of one row are finite."""
        return bool(self._summaries[0][sequence, row])


def _byte_count(onnx_type: int, sizes: tuple[int, ...]) -> int:
    return int(np.prod(sizes)) * _DTYPES[onnx_type].itemsize
