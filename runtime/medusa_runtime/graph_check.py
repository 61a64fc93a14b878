"""The result of validating a graph against the model it was exported from, as a build records it in the manifest."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from medusa_runtime.field_checks import check_text, check_unique, refuse

_STEP = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
DIFFERENCES = ("logits", "keys", "values")


@dataclass(frozen=True)
class GraphCheck:
    """The validation of one graph file.

    Attributes:
        steps: Names of the steps that were run and compared.
        logits: Largest relative difference of the logits from the model's in any of these steps.
        keys: The same for the new keys.
        values: The same for the new values.
        limit: Largest difference that is allowed.
        not_run: Why the graph was not run, "" if it was; without a run there are no steps and no differences.

    Raises:
        BundleError: A field is invalid.
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
            refuse("a graph check's steps", self.steps, "at least one, or the reason in not_run")
        for name, number in numbers.items():
            if type(number) is not float or not math.isfinite(number) or number < 0:
                refuse(f"a graph check's {name}", number, "a finite number of at least 0.0")
        if self.differs_by > numbers["limit"]:
            refuse("a graph check's largest difference", self.differs_by, f"at most its limit, {self.limit}")

    @property
    def differs_by(self) -> float:
        """The largest difference; 0.0 if the graph was not run."""
        return max(getattr(self, name) or 0.0 for name in DIFFERENCES)
