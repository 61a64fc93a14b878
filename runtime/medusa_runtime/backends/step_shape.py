"""The shape of a step on a GPU, and the padding of its past to one of a few lengths.

A GPU backend prepares each shape once (binding, CUDA graph) and then replays it, so the number of different shapes must
stay small. The length of the past grows with every token; it is therefore padded to 256, 512, 1,024, … rows, and the
graph ignores the rows from `past_length` on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from medusa_runtime.backends.base import Step
from medusa_runtime.capacity import grow_by_doubling

MIN_PADDED_PAST = 256  # rows; each longer padded past is twice the one before


class StepShape(NamedTuple):
    """The sizes that decide which binding and which CUDA graph a step can run with.

    Args:
        B: Number of sequences.
        T: Number of nodes of each sequence.
        R: Number of rows of each sequence whose logits are computed.
        draft: Whether the Medusa heads run.
        P: Rows of the past that are bound, padding included.
        causal: Whether the tree mask is the causal (lower triangular) one: prefill, plain decoding.
        summaries: Whether the R rows are summarised.
    """

    B: int
    T: int
    R: int
    draft: bool
    P: int
    causal: bool = False
    summaries: bool = False

    @property
    def S(self) -> int:  # noqa: N802
        """Number of rows of each sequence that are summarised."""
        return self.R if self.summaries else 0


def padded_past_length(length: int) -> int:
    """Return the rows that a step of one sequence binds behind a past of `length` rows, the context permitting.

    For example 0, 1 and 256 give 256; 257 gives 512.
    """
    return grow_by_doubling(MIN_PADDED_PAST, length)


def padded_past_lengths(context: int) -> tuple[int, ...]:
    """Return all padded lengths up to a model's context; the last one is the context itself.

    For example a context of 1,000 tokens gives (256, 512, 1000).
    """
    lengths = [MIN_PADDED_PAST]
    while lengths[-1] < context:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], min(lengths[-1], context))


def is_causal(step: Step) -> bool:
    """Return whether a step can run in a causal graph: no draft, and every node sees all nodes before it.

    A single node is causal with a draft too.
    """
    T = step.input_ids.shape[1]
    return T == 1 or (not step.draft and bool((step.tree_mask == np.tri(T, dtype=np.bool_)).all()))
