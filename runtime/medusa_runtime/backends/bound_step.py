"""One step bound to a session of ONNX Runtime on a CPU, so that running it again is a single call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, Step
from medusa_runtime.facts import ModelFacts


class BoundStep:
    """One step bound to the session: its input arrays, the buffers of its outputs, and the arena."""

    def __init__(
        self, session: Any, model: ModelFacts, step: Step, draft_hidden: FloatArray, arena: FloatArray
    ) -> None:
        (B, T), R = step.input_ids.shape, step.logit_rows.shape[1]
        layers = range(model.layers)
        pasts = [*map(contract.past_key, layers), *map(contract.past_value, layers)]
        presents = [*map(contract.present_key, layers), *map(contract.present_value, layers)]
        self.io_binding = session.io_binding()
        self._inputs = {  # kept, because the session reads their memory
            contract.INPUT_IDS: step.input_ids,
            contract.POSITION_IDS: step.position_ids,
            contract.TREE_MASK: step.tree_mask,
            contract.PAST_LENGTH: step.past_length,
            contract.DRAFT_HIDDEN: draft_hidden if step.draft else draft_hidden[:0],
            contract.LOGIT_ROWS: step.logit_rows,
            **{name: rows[None] for name, rows in zip(pasts, arena, strict=True)},
        }
        self.logits = np.zeros((B, R, model.vocab_size), dtype=np.float32)
        tokens, argmax = np.zeros((B, T), dtype=np.int32), np.zeros((B, R), dtype=np.int32)
        hidden = np.zeros((B, T, draft_hidden.shape[1]), dtype=np.float32)
        outputs = {
            contract.TOKENS: tokens,
            contract.ARGMAX: argmax,
            contract.LOGITS: self.logits,
            contract.HIDDEN: hidden,
            **{name: rows[None] for name, rows in zip(presents, arena, strict=True)},
        }
        for bind, arrays in ((self.io_binding.bind_input, self._inputs), (self.io_binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.nodes, self.arena = T, arena
        self.ids, self.past_length = step.input_ids[0].data, step.past_length.data
        self.tokens, self.argmax = row_views(tokens), row_views(argmax)
        self.hidden = [row_views(of_sequence) for of_sequence in hidden]


def row_views(array: NDArray[Any]) -> list[memoryview]:
    """Return the rows of an (N, M) array as memoryviews, which are read in a third of the time of numpy rows."""
    return [row.data for row in array]
