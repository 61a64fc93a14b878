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


def rotary_tables(model: Any, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines by which the decoder's rope turns each position, (positions, D / 2) each.

    D: the elements of a head that turn. A rope's attention factor (YaRN's) is multiplied in. As many positions are
    needed as a step may see rows, which is `spare_positions` more than the context.
    """
    every = torch.arange(positions).unsqueeze(0)
    with torch.no_grad():
        tables = model.base_model.rotary_emb(torch.zeros(1), every)
    # each angle stands there twice: for the two halves of a head, or (Cohere) for neighbouring elements
    half, pairs = tables[0].shape[-1] // 2, bool((tables[0][..., ::2] == tables[0][..., 1::2]).all())
    once = slice(0, None, 2) if pairs and half > 1 else slice(half)
    cos, sin = (table[0, :, once].float().contiguous().numpy() for table in tables)
    return cos, sin


def spare_positions(backends: Iterable[str]) -> int:
    """Rows behind the context that steps of these backends may reach, whose angles are read for nothing.

    A GPU pads a step to one of few sizes; the CPU's graph puts one dummy next to a row that stands alone.
    """
    return max(contract.SPARE_ROWS if backend == "ort-cpu" else MAX_PREFILL_CHUNK for backend in backends)
