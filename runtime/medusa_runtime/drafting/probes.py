"""Finds what was not tried for long, so that no observation, early, disturbed or outdated, is the last one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

EVERY = 32  # steps from one probe to the next, at least
SOON = 2  # the same behind a probe that gave more than what is in use
PATIENCE, MOST = 1.5, 4.0  # factor of a candidate's interval, for each probe that gave less, and at most

Candidate = TypeVar("Candidate", bound=Hashable)


class Probes:
    """Counts the steps of an engine, of all its answers, and when each choice was last among them."""

    def __init__(self) -> None:
        self._steps, self._next = 0, EVERY
        self._last: dict[Hashable, int] = {}
        self._promising: Hashable = None
        self._patience: dict[Hashable, float] = {}

    @property
    def is_time(self) -> bool:
        """Whether the last probe is long enough ago."""
        return self._steps >= self._next

    def due(self, intervals: Mapping[Candidate, float]) -> Candidate | None:
        """Return the candidate that is most overdue, None if none is, or if the last probe was a moment ago.

        Args:
            intervals: For each candidate, how many steps may be taken without it.
        """
        if not self.is_time or not intervals:
            return None
        waited = {
            one: (self._steps - self._last.get(one, 0)) / (steps * self._patience.get(one, 1.0))
            for one, steps in intervals.items()
        }
        if self._promising in waited:
            waited[self._promising] = max(waited[self._promising], 1.0)
        overdue = max(waited, key=waited.__getitem__)
        return overdue if waited[overdue] >= 1 else None

    def count(self, choice: Hashable, *, probed: bool = False, promising: bool = False) -> None:
        """Count a step.

        Args:
            choice: What it verified.
            probed: Whether it was a probe.
            promising: Whether the probe gave more than what is in use was expected to give; it is then repeated soon,
                since one observation proves little.
        """
        self._steps += 1
        self._last[choice] = self._steps
        if probed:
            self._next = self._steps + (SOON if promising else EVERY)
            self._promising = choice if promising else None
            self._patience[choice] = 1.0 if promising else min(MOST, PATIENCE * self._patience.get(choice, 1.0))
