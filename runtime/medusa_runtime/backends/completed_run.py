"""A run that succeeded; only through this object are its outputs read and its accepted nodes committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from medusa_runtime.backends.base import FloatArray, IntArray, RowSummary, StepOutputs, name_outputs
from medusa_runtime.backends.host_rows import HostRows
from medusa_runtime.backends.step_binding import StepBinding
from medusa_runtime.backends.step_errors import COMMITTED_BEFORE


class CompletedRun:
    """The last run of a backend. It exists only after the run succeeded, and is dropped when the next one begins.

    Reading and committing use the memory that the run was bound to, whatever else was allocated since.
    """

    def __init__(self, binding: StepBinding, seconds: float, rows: HostRows) -> None:
        """Record a run in the calling thread.

        Args:
            binding: What the step ran with.
            seconds: How long the run took.
            rows: Holds the rows of logits that are read.
        """
        self.binding, self.seconds, self._rows = binding, seconds, rows
        self.thread = threading.get_ident()
        self._commits_begun: set[int] = set()  # sequences

    def read_tokens(self, sequence: int) -> list[int]:
        """Return the ids of the T nodes."""
        return self.binding.host.read_tokens(sequence)

    def read_argmax(self, sequence: int) -> list[int]:
        """Return the greedy next ids of the R rows."""
        return self.binding.host.read_argmax(sequence)

    def read_logits(self, row: int, sequence: int) -> FloatArray:
        """Copy the logits of one row from the device, on its first use: (V,) float32, valid until the next run."""
        binding = self.binding
        _check_index("sequence", sequence, binding.shape.B)
        _check_index("row", row, binding.host.sizes[1])
        outputs = binding.memory.outputs
        address = outputs.logits_address(binding.shape, sequence, row)
        return self._rows.read((sequence, row), address, outputs.vocab_size)

    def read_summary(self, row: int, sequence: int) -> RowSummary | None:
        """Return the summary of one row; None if the step did not ask for summaries."""
        binding = self.binding
        _check_index("sequence", sequence, binding.shape.B)
        _check_index("row", row, binding.host.sizes[1])
        return binding.host.read_summary(row, sequence)

    def read_finite(self, row: int, sequence: int) -> bool:
        """Return whether all logits of one row are finite, from pinned host memory."""
        binding = self.binding
        _check_index("sequence", sequence, binding.shape.B)
        _check_index("row", row, binding.host.sizes[1])
        return binding.host.read_finite(row, sequence)

    def read_outputs(self) -> StepOutputs:
        """Copy all outputs from the device, without the padding."""
        shape, host, memory = self.binding.shape, self.binding.host, self.binding.memory
        B, T, R = shape.B, shape.T, shape.R
        nodes, rows = host.sizes  # of the step itself, T and R at most
        outputs = memory.outputs

        def ids(read: Callable[[int], list[int]]) -> IntArray:
            return np.array([read(sequence) for sequence in range(B)], np.int32)

        logits = self._read(outputs.logits.address, B, R, outputs.vocab_size)
        hidden = self._read(outputs.hidden.address, B, T, outputs.hidden_size)
        new = memory.arena.read_new(T, host.past_length)  # (2 · layers, B, T, W)
        return name_outputs(
            ids(host.read_tokens), ids(host.read_argmax), logits[:, :rows], hidden[:, :nodes], new[:, :, :nodes]
        )

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Keep the accepted nodes (see `BatchMemory.commit`).

        An arena may move rows in place, so a commit cannot be repeated, whether it was interrupted or not:
        RuntimeError.
        """
        _check_index("sequence", sequence, self.binding.shape.B)
        _check_index("node", path[-1], self.binding.host.sizes[0])
        if sequence in self._commits_begun:
            raise RuntimeError(COMMITTED_BEFORE)
        self._commits_begun.add(sequence)
        self.binding.memory.commit(self.binding.shape, sequence, path, length)

    def _read(self, address: int, *shape: int) -> FloatArray:
        array = np.empty(shape, np.float32)
        self.binding.memory.device.read(array, address)
        return array


def _check_index(what: str, index: int, count: int) -> None:
    """Raise IndexError for what would be another address of the device's memory."""
    if not 0 <= index < count:
        raise IndexError(f"{what} {index} does not exist; expected one from 0 to {count - 1}")
