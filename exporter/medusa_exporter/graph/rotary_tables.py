"""Tables of the cosines and sines by which rotary embeddings (RoPE) turn each position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from medusa_runtime import contract
from medusa_runtime.backends.base import MAX_PREFILL_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable

from numpy.typing import NDArray

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]  # cosines and sines


def rotary_tables(model: Any, positions: int) -> Tables:
    """Return the cosines and sines of all positions from 0, as the decoder computes them.

    Args:
        model: The decoder.
        positions: How many rows a table has: the bundle's context and `spare_positions`.

    Returns:
        Two tables (positions, D / 2), where D elements of each head rotate. The attention factor (of YaRN and longrope)
        is multiplied in.
    """
    every = torch.arange(positions).unsqueeze(0)
    with torch.no_grad():
        tables = model.base_model.rotary_emb(torch.zeros(1), every)
    # transformers repeats each angle: for the two halves of a head, or (Cohere) for neighbouring elements
    half, neighbours = tables[0].shape[-1] // 2, bool((tables[0][..., ::2] == tables[0][..., 1::2]).all())
    once = slice(0, None, 2) if neighbours and half > 1 else slice(half)
    cos, sin = (table[0, :, once].float().contiguous().numpy() for table in tables)
    return cos, sin


def spare_positions(backends: Iterable[str]) -> int:
    """Return how many positions behind the context the steps of these backends may read; their results are not used.

    A GPU pads a step to one of few sizes.
    """
    return max(contract.SPARE_ROWS if backend == "ort-cpu" else MAX_PREFILL_CHUNK for backend in backends)


def with_still_row(tables: Tables) -> Tables:
    """Return tables with a last row that rotates by nothing: cosines of 1 and sines of 0."""
    cos, sin = (
        np.concatenate([table, np.full_like(table[:1], number)]) for table, number in zip(tables, (1, 0), strict=True)
    )
    return cos, sin
