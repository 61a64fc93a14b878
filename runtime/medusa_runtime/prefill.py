"""Prefill: computes the keys and values of a prompt, in parts, behind the rows that it reuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medusa_runtime.backends.base import Backend, literal_step
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.sequence import SequenceState


def prefill(
    backend: Backend, cache: KvCache, sequence: SequenceState, checkpoint: Callable[[], None] | None = None
) -> None:
    """Run the steps of a sequence's prompt behind the rows in the cache, and keep all rows.

    Afterwards row 0 of the backend's last step has the logits behind the prompt.

    Args:
        backend: The backend.
        cache: Its KV cache, whose past are rows of the first `sequence.reused` tokens of the prompt.
        sequence: The sequence, at least one of whose prompt's tokens is not in the cache.
        checkpoint: Called before each part; what it raises ends the prefill.
    """
    cache.truncate(sequence.reused)
    cache.reserve(len(sequence.prompt))
    ids = np.array(sequence.prompt, dtype=np.int32)
    for first in range(sequence.reused, ids.size, backend.prefill_chunk):
        if checkpoint is not None:
            checkpoint()
        part = ids[first : first + backend.prefill_chunk]
        last = np.array([part.size - 1], dtype=np.int32)
        backend.run(literal_step(part, first, last, sequence.summaries))
        cache.commit(range(part.size))
