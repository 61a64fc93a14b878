"""Keeps the step inputs of the drafts that were used last, so that a backend binds each of them once."""

from __future__ import annotations

from typing import NamedTuple

from medusa_profiles.profile import TreeProfile, shown

from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import HeadFacts
from medusa_runtime.tree_step import TreeStep

MAX_CACHED_STEPS = 24


class _Kind(NamedTuple):
    profile: TreeProfile
    summaries: bool
    literals: int


class StepCache:
    """The inputs of the steps of one decoder, by tree, number of literals, and whether rows are summarised.

    Args:
        heads: The bundle's heads.
    """

    def __init__(self, heads: HeadFacts) -> None:
        self._heads = heads
        self._steps: dict[_Kind, TreeStep] = {}  # the oldest first
        self._last: TreeStep | None = None  # found without hashing a tree

    def get(self, profile: TreeProfile, summaries: bool = False, literals: int = 0) -> TreeStep:
        """Return the inputs for a draft.

        Args:
            profile: The tree of the heads' candidates.
            summaries: Whether the backend summarises the tree's rows.
            literals: Number of literals beside them.

        Raises:
            ProfileError: The tree needs more heads or candidates than the bundle has.
            ArgumentError: `profile` is not a TreeProfile.
        """
        last = self._last
        if last is not None and last.matches(profile, summaries, literals):
            return last
        if not isinstance(profile, TreeProfile):
            raise ArgumentError(
                f"the profile is {shown(profile)}, of type {type(profile).__name__}; expected a TreeProfile: pass "
                "Bundle.profile(name), or None for plain decoding"
            )
        kind = _Kind(profile, summaries, literals)
        if kind not in self._steps:
            profile.check_fits(self._heads.count, self._heads.top_k)
            self._steps[kind] = TreeStep(profile, self._heads.top_k, summaries, literals)
            while len(self._steps) > MAX_CACHED_STEPS:
                del self._steps[next(iter(self._steps))]
        self._last = self._steps[kind]
        return self._last
