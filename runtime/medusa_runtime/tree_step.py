"""The inputs of the step that drafts and verifies one tree."""

from __future__ import annotations

import numpy as np
from medusa_profiles.profile import TreeProfile

from medusa_runtime.backends.base import Step


class TreeStep:
    """The `Step` of one tree, allocated once: only root token, positions and past length change from run to run.

    They are written through memoryviews. Each run streams the weights through the CPU's caches, so the code that runs
    next finds them cold, and indexing a numpy array took 10 to 50 microseconds per access there.

    Args:
        profile: The tree.
        top_k: Candidates that each head ranks.
        summaries: Whether all rows are summarised, where the backend's graphs can.
    """

    def __init__(self, profile: TreeProfile, top_k: int, summaries: bool = False) -> None:
        T = profile.size
        self.profile = profile
        self.step = Step(
            input_ids=profile.candidate_ids(top_k)[None],
            position_ids=np.zeros((1, T), dtype=np.int32),
            tree_mask=np.ascontiguousarray(profile.mask[None]),
            past_length=np.zeros(1, dtype=np.int32),
            logit_rows=np.arange(T, dtype=np.int32)[None],
            draft=T > 1,
            summaries=summaries,
        )
        self._depths: list[int] = profile.depths.tolist()
        self._ids, self._positions = self.step.input_ids[0].data, self.step.position_ids[0].data
        self._past_length = self.step.past_length.data

    def update(self, root: int, length: int) -> None:
        """Set the root token id and place the tree behind a past of `length` rows."""
        self._ids[0] = root
        positions = self._positions
        for node, depth in enumerate(self._depths):
            positions[node] = length + depth
        self._past_length[0] = length
