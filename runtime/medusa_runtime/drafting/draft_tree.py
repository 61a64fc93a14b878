"""The tree that one step verifies: candidates of the heads, literal tokens that the host knows, or both."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from medusa_profiles.profile import BoolArray, IntArray, TreeProfile


class DraftTree:
    """A tree of the heads' candidates and a chain of literals, both behind the same root.

    The nodes of the profile come first, so that its most likely chain keeps its place directly behind the root; then
    come the literals, each behind the one before, and the first one behind the root.

    Example: the profile with the paths [0] and [0, 0], and two literals::

        node       0 (root)   1         2         3          4
        parent     -          0         1         0          3
        holds      token      head 0    head 1    literal    literal

    Args:
        profile: The tree of the heads' candidates; plain decoding has none.
        literals: Number of literals.
    """

    def __init__(self, profile: TreeProfile, literals: int = 0) -> None:
        self.profile, self.literals = profile, literals
        self.size = profile.size + literals
        self.depth = max(profile.depth, literals)
        self.drafts = profile.size > 1  # whether the heads run

    @property
    def name(self) -> str:
        """The profile's name, "ngram-3" for three literals, or both joined by a plus sign."""
        parts = [self.profile.name] if self.drafts or not self.literals else []
        return "+".join([*parts, *([f"ngram-{self.literals}"] if self.literals else [])])

    @cached_property
    def first_literal(self) -> int:
        """Node of the first literal."""
        return self.profile.size

    @cached_property
    def depths(self) -> IntArray:
        """Depth of each node, (T,) int32, 0 at the root."""
        return np.concatenate([self.profile.depths, np.arange(1, self.literals + 1, dtype=np.int32)])

    @cached_property
    def mask(self) -> BoolArray:
        """Attention mask, (T, T) bool: node i attends to node j where j is i itself or an ancestor of i."""
        first = self.first_literal
        mask = np.zeros((self.size, self.size), dtype=np.bool_)
        mask[:first, :first] = self.profile.mask
        mask[first:, first:] = np.tri(self.literals, dtype=np.bool_)
        mask[first:, 0] = True
        return mask

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, T tuples of node indices in ascending order."""
        first = self.first_literal
        root, *others = self.profile.children
        chain = [(node + 1,) for node in range(first, self.size - 1)]
        if not self.literals:
            return self.profile.children
        return ((*root, first), *others, *chain, ())

    def node_ids(self, top_k: int) -> IntArray:
        """Return the graph's `input_ids`, a new array (T,) int32; 0 at the root and at literals, to be replaced.

        Args:
            top_k: Candidates that each head ranks.

        Raises:
            ProfileError: The heads do not rank so many candidates (`TreeProfile.candidate_ids`).
        """
        return np.concatenate([self.profile.candidate_ids(top_k), np.zeros(self.literals, dtype=np.int32)])
