"""Shows calibrations as tables."""

from __future__ import annotations

from collections.abc import Iterable

from medusa_runtime.calibration import GraphCalibration
from medusa_runtime.profile_choice import Expectation

from medusa_exporter import console
from medusa_exporter.bench.table import cell

EXPECTED = ("tree", "nodes", "depth", "tokens/step", "step ms", "overhead", "speed-up")


def step_times_table(calibration: GraphCalibration) -> str:
    """Return a table of the step times: a row for each size, a column for each length of the past."""
    times = {(step.nodes, step.past): step for step in calibration.steps if step.batch == 1}
    headings = ["nodes", *(f"ms, past {past:,}" for past in calibration.pasts)]
    rows = [
        [
            str(nodes),
            *(f"{cell(times[nodes, past].ms)} ({times[nodes, past].spread_ms:.2f})" for past in calibration.pasts),
        ]
        for nodes in calibration.sizes
    ]
    title = f"{calibration.graph} on {calibration.machine}: median and interquartile range of a step"
    return console.table(headings, rows, text=(), title=title)


def expectations_table(found: Iterable[Expectation]) -> str:
    """Return a table with a row for each tree."""
    rows = [
        [
            one.profile.name,
            str(one.profile.size),
            str(one.profile.depth),
            *map(cell, (one.tokens_per_step, one.step_ms, one.overhead, one.speedup)),
        ]
        for one in found
    ]
    return console.table(EXPECTED, rows)
