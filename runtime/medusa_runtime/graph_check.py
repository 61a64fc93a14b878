"""What a build found when it ran a graph next to the model that it was made from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from medusa_runtime.field_checks import check_text, check_unique, refuse

_STEP = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
DIFFERENCES = ("logits", "keys", "values")


@dataclass(frozen=True)
class GraphCheck:
    """The check of one graph file. Raises BundleError for what does not hold.

    steps: names of the steps that were run and compared. logits, keys, values: the largest difference from the model's
    numbers in any of these steps, as a share of their size, and limit what they may come to at most. not_run: why the
    graph was not run, "" where it was; it then has no steps and no differences.
    """

    steps: tuple[str, ...] = ()
    logits: float | None = None
    keys: float | None = None
    values: float | None = None
    limit: float | None = None
    not_run: str = ""

    def __post_init__(self) -> None:
        for step in check_unique("a graph check's steps", self.steps):
            check_text("a step of a graph check", step, _STEP)
        numbers = {name: getattr(self, name) for name in (*DIFFERENCES, "limit")}
        if self.not_run != "":
            check_text("a graph check's not_run", self.not_run)
            if self.steps or any(number is not None for number in numbers.values()):
                refuse("a graph check", self, "no steps and no differences where the graph was not run")
            return
        if not self.steps:
            refuse("a graph check's steps", self.steps, "at least one, or not_run to say why there are none")
        for name, number in numbers.items():
            if type(number) is not float or not math.isfinite(number) or number < 0:
                refuse(f"a graph check's {name}", number, "a finite number of at least 0.0")
        if self.differs_by > numbers["limit"]:
            refuse("a graph check's largest difference", self.differs_by, f"at most its limit, {self.limit}")

    @property
    def differs_by(self) -> float:
        """The largest of the differences; 0.0 where the graph was not run."""
        return max(getattr(self, name) or 0.0 for name in DIFFERENCES)
