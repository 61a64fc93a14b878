"""How long steps take: what a calibration measured or a first guess, corrected by the steps that were run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

NODE_COST = 0.05  # of plain decoding's time that a further node is assumed to cost before it was measured
TRIES = 2  # steps of a kind after which its time is known well enough to be compared
# Medians of so many, so that a disturbed step counts for nothing. When the machine's speed changes, the third step of
# five shows it, before it is the majority of any kind's seven.
SPEEDS, COSTS = 5, 7


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
        self._counts: dict[Kind, int] = {}
        self._last_costs: dict[Kind, deque[float]] = {}
        self._costs: dict[Kind, float] = {}  # their medians; of kinds that were not run, the guess
        self._last_speeds: deque[float] = deque(maxlen=SPEEDS)
        self._speed = 0.0  # their median

    def add(self, kind: Kind, ms: float) -> None:
        """Count one step that was run."""
        if ms <= 0:
            return
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= self._skipped:
            return
        log_ms = math.log(ms)
        if not self._last_speeds:
            self._add_speed(log_ms - self._cost(kind))
        last = self._last_costs.setdefault(kind, deque(maxlen=COSTS))
        last.append(log_ms - self._speed)
        self._costs[kind] = _median(last)
        self._add_speed(log_ms - self._costs[kind])

    def _add_speed(self, speed: float) -> None:
        self._last_speeds.append(speed)
        self._speed = _median(self._last_speeds)

    def is_known(self, kind: Kind, steps: int = TRIES) -> bool:
        """Return whether so many steps of a kind were run, by default enough to compare its time with others'."""
        return self._counts.get(kind, 0) >= self._skipped + steps

    def ms(self, kind: Kind) -> float:
        """Return the expected milliseconds of a step; before any was run, in units of the guess."""
        return math.exp(self._speed + self._cost(kind))

    def _cost(self, kind: Kind) -> float:
        if kind not in self._costs:  # once: a guess may be a lookup in a calibration
            ms = self._guess(kind) if self._guess is not None else None
            self._costs[kind] = math.log(1.0 + NODE_COST * (kind.nodes - 1) if ms is None else ms)
        return self._costs[kind]


def _median(values: Collection[float]) -> float:
    """Return the median, of an even number the lower one: what disturbs a step makes it longer."""
    return sorted(values)[(len(values) - 1) // 2]
