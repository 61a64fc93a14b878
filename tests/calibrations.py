"""Calibrations for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from medusa_runtime.calibration import Acceptance, AnswerHits, GraphCalibration, Machine, StepTime

MACHINE = Machine("paper", 2, "none", "fake 1.0", "0.1.0")
DIGEST = "a" * 64


def steps(times: dict[int, float], pasts: tuple[int, ...] = (64, 256)) -> tuple[StepTime, ...]:
    """The time of each size, one millisecond more for each length of the past behind the first."""
    return tuple(
        StepTime(1, nodes, past, ms + place, 0.1, 20) for nodes, ms in times.items() for place, past in enumerate(pasts)
    )


def acceptance(hits: Any, check: Any = None, past: float = 64.0) -> Acceptance:
    """Two equal answers with these hits (S, K), the second one for checking unless it has its own."""
    both = [np.array(hits, np.int16), np.array(hits if check is None else check, np.int16)]
    ranks = (10,) * both[0].shape[1]
    return Acceptance(ranks, past, tuple(AnswerHits(n, n == 2, one) for n, one in enumerate(both, start=1)))


def calibration(times: dict[int, float] | None = None, known: Acceptance | None = None, **changes: Any) -> Any:
    """A calibration of ort-cpu-fp32: a step of n nodes takes 10 + n milliseconds."""
    times = {nodes: 10.0 + nodes for nodes in (1, 2, 4, 8)} if times is None else times
    facts = {"bundle": DIGEST, "graph": "ort-cpu-fp32", "machine": MACHINE, "steps": steps(times)} | changes
    return GraphCalibration(**facts, acceptance=known)
