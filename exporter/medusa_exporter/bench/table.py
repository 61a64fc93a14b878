"""Shows the results of a benchmark as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medusa_runtime.facts import PLAIN

from medusa_exporter import console

LABELS = {"backend": "backend", "prompt_length": "prompt", "max_new_tokens": "new", "profile": "profile"}
COLUMNS = {  # heading -> key of a result
    "nodes": "nodes",
    "tokens/step": "tokens_per_step",
    "plain ms": "plain_step_ms",
    "tree ms": "medusa_step_ms",
    "overhead": "overhead",
    "speed-up": "speedup",
    "over best": "speedup_over_best_plain",
    "tokens/s": "tokens_per_second",
    "ttft ms": "ttft_ms",
    "host us": "host_us_per_step",
    "differ": "divergences",
}


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line for each result; a label that all results share has no column."""
    cases = {(result["prompt_length"], result["max_new_tokens"]) for result in results}
    several = {"backend": len({result["backend"] for result in results}) > 1}
    several |= {"prompt_length": len(cases) > 1, "max_new_tokens": len(cases) > 1, "profile": True}
    labels = [name for name in LABELS if several[name]]
    headings = [LABELS[name] for name in labels]
    rows = [
        [*(_label(result[name]) for name in labels), *(cell(_value(result[key])) for key in COLUMNS.values())]
        for result in results
    ]
    return console.table([*headings, *COLUMNS], rows, text=headings)


def categories_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a table of the tokens per step in each category of prompts; "" with fewer than two categories.

    Args:
        results: The results of one backend.
    """
    trees = [result for result in results if result["profile"] != PLAIN]
    if not trees or len(trees[0]["categories"]) < 2:
        return ""
    rows = [
        [name, str(found["prompts"]), *(cell(result["categories"][name]["tokens_per_step"]) for result in trees)]
        for name, found in trees[0]["categories"].items()
    ]
    return console.table(["tokens/step", "prompts", *(result["profile"] for result in trees)], rows)


def cell(value: float | None) -> str:
    """Format a value with about three digits."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _value(metric: Any) -> float | None:
    """Return the metric itself, or its median where it has percentiles."""
    value: float | None = metric["p50"] if isinstance(metric, dict) else metric
    return value


def _label(value: Any) -> str:
    return "-" if value is None else str(value)
