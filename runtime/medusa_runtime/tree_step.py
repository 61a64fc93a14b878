"""The inputs of the step that verifies one draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from medusa_profiles.profile import TreeProfile

from medusa_runtime.backends.base import Step
from medusa_runtime.drafting.draft_tree import DraftTree


class TreeStep:
    """The `Step` of one draft, allocated once: only root, literals, positions and past length change from run to run.

    They are written through memoryviews. Each run streams the weights through the CPU's caches, so the code that runs
    next finds them cold, and indexing a numpy array took 10 to 50 microseconds per access there.

    Args:
        profile: The tree of the heads' candidates.
        top_k: Candidates that each head ranks.
        summaries: Whether all rows are summarised, where the backend's graphs can.
        literals: Number of literals beside them.
    """

    def __init__(self, profile: TreeProfile, top_k: int, summaries: bool = False, literals: int = 0) -> None:
        self.tree = tree = DraftTree(profile, literals)
        T = tree.size
        self.step = Step(
            input_ids=tree.node_ids(top_k)[None],
            position_ids=np.zeros((1, T), dtype=np.int32),
            tree_mask=np.ascontiguousarray(tree.mask[None]),
            past_length=np.zeros(1, dtype=np.int32),
            logit_rows=np.arange(T, dtype=np.int32)[None],
            draft=tree.drafts,
            summaries=summaries,
        )
        self._depths: list[int] = tree.depths.tolist()
        self._ids, self._positions = self.step.input_ids[0].data, self.step.position_ids[0].data
        self._past_length = self.step.past_length.data

    def matches(self, profile: TreeProfile, summaries: bool, literals: int) -> bool:
        """Return whether these are the inputs of such a draft, of this profile object."""
        return self.tree.profile is profile and self.tree.literals == literals and self.step.summaries is summaries

    def update(self, root: int, length: int, literals: Sequence[int] = ()) -> None:
        """Set the token ids of the root and of all literals, and place the tree behind a past of `length` rows."""
        ids = self._ids
        ids[0] = root
        for node, literal in enumerate(literals, self.tree.first_literal):
            ids[node] = literal
        positions = self._positions
        for node, depth in enumerate(self._depths):
            positions[node] = length + depth
        self._past_length[0] = length
