"""One result of a bench as the report takes it, every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_runtime.facts import PLAIN
from medusa_runtime.field_checks import check_int, check_object, check_text, refuse

from medusa_exporter.bench.results import Case

MOST = 2**63 - 1
TEXTS = ("backend", "precision", "profile")
COUNTS = ("nodes", "max_new_tokens", "turns", "divergences", "failures")
FIGURES = (
    "tokens_per_step",
    "overhead",
    "speedup",
    "tokens_per_second",
    "tpot_ms",
    "kv_length",
    "host_us_per_step",
    "bound_ms",
)
PERCENTILES = {"step_ms": ("mean", "p10", "p50", "p90", "p99"), "ttft_ms": ("p50", "p90")}


@dataclass(frozen=True)
class BenchResult:
    """Figures of one backend, profile, prompt length and output length, named as in the JSON; None: there was no step.

    run: the letter of its run. step_ms, ttft_ms: PERCENTILES by name. same_as_first: "equal" of "answers".
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
    kv_length: float | None
    host_us_per_step: float | None
    bound_ms: float | None
    divergences: int
    failures: int
    step_ms: Mapping[str, float | None]
    ttft_ms: Mapping[str, float | None]
    same_as_first: Mapping[str, int] | None

    @property
    def case(self) -> Case:
        """What it shares with other backends and profiles."""
        return Case(self.prompt_length, self.max_new_tokens)

    @property
    def series(self) -> tuple[str, str, str]:
        """What has one colour in the plots: run, backend, precision."""
        return self.run, self.backend, self.precision

    @property
    def is_plain(self) -> bool:
        """Whether no tree was used."""
        return self.profile == PLAIN

    @classmethod
    def checked(cls, run: str, what: str, result: object) -> BenchResult:
        """Take a result from JSON, named `what`. Raises KeyError for what it lacks, BundleError for what is wrong."""
        given = check_object(what, result)
        values: dict[str, Any] = {name: check_text(f"{what}.{name}", given[name]) for name in TEXTS}
        for name in COUNTS:
            values[name] = _count(f"{what}.{name}", given[name])
        length = given["prompt_length"]
        values["prompt_length"] = None if length is None else _count(f"{what}.prompt_length", length)
        for name in FIGURES:
            values[name] = check_figure(f"{what}.{name}", given[name])
        for name, keys in PERCENTILES.items():
            found = check_object(f"{what}.{name}", given[name])
            values[name] = {key: check_figure(f"{what}.{name}.{key}", found[key]) for key in keys}
        same = given["same_as_first"]
        if same is not None:
            found = check_object(f"{what}.same_as_first", same)
            same = {key: _count(f"{what}.same_as_first.{key}", found[key]) for key in ("equal", "answers")}
        return cls(run=run, same_as_first=same, **values)


def check_figure(what: str, value: Any) -> float | None:
    """Return a finite number of at least 0, or None; refuse all else (BundleError)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        refuse(what, value, "a number of at least 0")
    return value


def _count(what: str, value: Any) -> int:
    check_int(what, value, 0, MOST)
    return int(value)
