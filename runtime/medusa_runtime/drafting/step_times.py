"""How long steps take: what a calibration measured or a first guess, corrected by the steps that were run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

NODE_COST = 0.05  # of plain decoding's time that a further node is assumed to cost before it was measured
TRIES = 2  # steps of a kind after which its time is known well enough to be compared
SPEED_WEIGHT = 0.2  # of a step's deviation that is the machine's, or due to a longer past: it holds for all kinds
KIND_WEIGHTS = (
    0.8,
    0.4,
    0.2,
    0.1,
    0.05,
)  # of the deviation that is due to the kind of step, the first times and then always
MOST = math.log(3.0)  # a step that deviates by more was disturbed, and counts as much as that


class Kind(NamedTuple):
    """What the time of a step depends on, besides the machine's speed and the length of its past.

    Args:
        nodes: Nodes of the tree.
        heads: Whether the heads run.
    """

    nodes: int
    heads: bool


class StepTimes:
    """Expected milliseconds of the steps of a decoder: exp(speed + cost of the kind).

    The speed is common to all kinds, so that a slower hour, or a longer past, does not change which kind is the best.

    Args:
        guess: Returns milliseconds of a kind of step, or None where nothing is known; only ratios matter.
        skipped: Number of the first steps of each kind that do not count, since the backend prepares the shape in them.
    """

    def __init__(self, guess: Callable[[Kind], float | None] | None = None, skipped: int = 0) -> None:
        self._guess, self._skipped = guess, skipped
        self._costs: dict[Kind, float] = {}
        self._counts: dict[Kind, int] = {}
        self._speed: float | None = None

    def add(self, kind: Kind, ms: float) -> None:
        """Count one step that was run."""
        if ms <= 0:
            return
        count = self._counts.get(kind, 0) - self._skipped
        self._counts[kind] = count + self._skipped + 1
        if count < 0:
            return
        cost = self._cost(kind)
        if self._speed is None:
            self._speed = math.log(ms) - cost
        error = max(-MOST, min(MOST, math.log(ms) - self._speed - cost))
        self._speed += SPEED_WEIGHT * error
        self._costs[kind] = cost + KIND_WEIGHTS[min(count, len(KIND_WEIGHTS) - 1)] * error

    def is_known(self, kind: Kind) -> bool:
        """Return whether enough steps of a kind were run to compare its time with others'."""
        return self._counts.get(kind, 0) >= self._skipped + TRIES

    def ms(self, kind: Kind) -> float:
        """Return the expected milliseconds of a step; before any was run, in units of the guess."""
        return math.exp((self._speed or 0.0) + self._cost(kind))

    def _cost(self, kind: Kind) -> float:
        known = self._costs.get(kind)
        if known is None:
            ms = self._guess(kind) if self._guess is not None else None
            known = math.log(1.0 + NODE_COST * (kind.nodes - 1) if ms is None else ms)
        return known
