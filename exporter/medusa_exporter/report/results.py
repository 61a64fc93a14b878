"""One result of a benchmark, with every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_runtime.facts import PLAIN
from medusa_runtime.field_checks import check_int, check_object, check_text, refuse

from medusa_exporter.bench.results import Case

MAX_COUNT = 2**63 - 1
TEXTS = ("backend", "precision", "profile")
COUNTS = ("nodes", "max_new_tokens", "turns", "divergences", "mismatches")
METRICS = (
    "tokens_per_step",
    "overhead",
    "speedup",
    "tokens_per_second",
    "tpot_ms",
    "mean_past_length",
    "host_us_per_step",
    "memory_bound_ms",
)
PERCENTILES = {"step_ms": ("mean", "p10", "p50", "p90", "p99"), "ttft_ms": ("p50", "p90")}
SAME = ("identical", "answers")


@dataclass(frozen=True)
class BenchResult:
    """The metrics of one backend, profile, prompt length and output length, under the names of the JSON.

    A metric is None if no step was run. `run` is the letter of the run. `step_ms` and `ttft_ms` have percentiles by
    name. `same_as_first_backend` counts the `answers`, and those of them that are `identical` to the answers of the
    run's first backend.
    """

    run: str
    backend: str
    precision: str
    profile: str
    nodes: int
    prompt_length: int | None
    max_new_tokens: int
    turns: int
    tokens_per_step: float | None
    overhead: float | None
    speedup: float | None
    tokens_per_second: float | None
    tpot_ms: float | None
    mean_past_length: float | None
    host_us_per_step: float | None
    memory_bound_ms: float | None
    divergences: int
    mismatches: int
    step_ms: Mapping[str, float | None]
    ttft_ms: Mapping[str, float | None]
    same_as_first_backend: Mapping[str, int] | None

    @property
    def case(self) -> Case:
        """Prompt length and output length, in which results of other backends and profiles are comparable."""
        return Case(self.prompt_length, self.max_new_tokens)

    @property
    def series(self) -> tuple[str, str, str]:
        """Run, backend and precision: results with the same series have one colour in the plots."""
        return self.run, self.backend, self.precision

    @property
    def is_plain(self) -> bool:
        """Whether this is plain decoding."""
        return self.profile == PLAIN

    @classmethod
    def from_json(cls, run: str, what: str, result: object) -> BenchResult:
        """Check a result from a JSON file.

        Args:
            run: The letter of the run.
            what: The name of the result in error messages.
            result: The JSON object.

        Raises:
            KeyError: A value is missing.
            BundleError: A value is wrong.
        """
        found = check_object(what, result)
        values: dict[str, Any] = {name: check_text(f"{what}.{name}", found[name]) for name in TEXTS}
        for name in COUNTS:
            values[name] = _check_count(f"{what}.{name}", found[name])
        length = found["prompt_length"]
        values["prompt_length"] = None if length is None else _check_count(f"{what}.prompt_length", length)
        for name in METRICS:
            values[name] = check_metric(f"{what}.{name}", found[name])
        for name, keys in PERCENTILES.items():
            points = check_object(f"{what}.{name}", found[name])
            values[name] = {key: check_metric(f"{what}.{name}.{key}", points[key]) for key in keys}
        same = found["same_as_first_backend"]
        if same is not None:
            counts = check_object(f"{what}.same_as_first_backend", same)
            same = {key: _check_count(f"{what}.same_as_first_backend.{key}", counts[key]) for key in SAME}
        return cls(run=run, same_as_first_backend=same, **values)


def check_metric(what: str, value: Any) -> float | None:
    """Return a finite number of at least 0, or None; refuse everything else with BundleError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        refuse(what, value, "a number of at least 0")
    return value


def _check_count(what: str, value: Any) -> int:
    check_int(what, value, 0, MAX_COUNT)
    return int(value)
