"""Prefill: computes the keys and values of a prompt, in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medusa_runtime.backends.base import Backend, literal_step
from medusa_runtime.kv_cache import KvCache


def prefill(
    backend: Backend,
    cache: KvCache,
    prompt: Sequence[int],
    *,
    summaries: bool = False,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """Run the steps of a prompt behind an empty past, and keep all rows.

    Afterwards row 0 of the backend's last step has the logits behind the prompt.

    Args:
        backend: The backend.
        cache: Its KV cache; rows of an earlier sequence are discarded.
        prompt: Token ids, at least one.
        summaries: Whether the backend summarises the row.
        checkpoint: Called before each part; what it raises ends the prefill.
    """
    cache.truncate(0)
    cache.reserve(len(prompt))
    ids = np.array(prompt, dtype=np.int32)
    for first in range(0, ids.size, backend.prefill_chunk):
        if checkpoint is not None:
            checkpoint()
        part = ids[first : first + backend.prefill_chunk]
        last = np.array([part.size - 1], dtype=np.int32)
        backend.run(literal_step(part, first, last, summaries))
        cache.commit(range(part.size))
