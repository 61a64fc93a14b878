"""How many cases a fuzz run takes, and what came of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from .child import Child

SHARE = float(os.environ.get("MEDUSA_FUZZ", "0"))  # of a full run's cases, 1 in `make fuzz`; 0 for a short run
SEED = int(os.environ.get("MEDUSA_FUZZ_SEED", "0"))
EXPECTED = ("refused", "answered", "loaded")  # outcomes; any other is a finding
GROWTH = 300.0  # MB that a child may come to hold beyond what it held after its first cases
SETTLED = 50  # cases that a child settles in, or the first third where there are fewer


@dataclass
class Tally:
    """Outcomes by the layer that gave them, and the findings with the case that shows each."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def take(self, case: dict[str, Any], answer: dict[str, Any]) -> None:
        """Count one case."""
        self.counts[f"{answer['outcome']}: {answer.get('layer', '?')}"] += 1
        if answer["outcome"] not in EXPECTED:
            self.findings.append((case, answer))
        if "megabytes" in answer:
            self.megabytes.append(answer["megabytes"])

    @property
    def growth(self) -> float:
        """MB that the child grew by after it had settled."""
        share = min(SETTLED, len(self.megabytes) // 3)
        return max(self.megabytes[-share:]) - max(self.megabytes[share : 2 * share]) if share else 0.0

    def lines(self) -> list[str]:
        """For a person to read."""
        total = sum(self.counts.values())
        found = [f"{self.name}: {total} cases, {len(self.findings)} findings, grew by {self.growth:.0f} MB"]
        return found + [f"  {count:6} {what}" for what, count in sorted(self.counts.items())]


def run_cases(
    name: str, child: Child, cases: SearchStrategy[dict[str, Any]], full: int, short: int, check: Callable[[Any], bool]
) -> Tally:
    """Try SHARE of `full` cases, or `short` ones where that is fewer; the same ones each time for one seed.

    check: whether a finding is known (a crash inside ONNX Runtime that is listed) and only counted.
    """
    tally = Tally(name)

    @seed(SEED)
    @settings(
        max_examples=max(short, round(SHARE * full)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def each(case: dict[str, Any]) -> None:
        answer = child.ask(case)
        if answer["outcome"] not in EXPECTED and check((case, answer)):
            answer = answer | {"outcome": "refused", "layer": "known crash inside ONNX Runtime"}
        tally.take(case, answer)

    try:
        each()
    finally:
        child.close()
    return tally
