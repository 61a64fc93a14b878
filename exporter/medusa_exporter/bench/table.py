"""A run's figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medusa_runtime.facts import PLAIN

COLUMNS = {  # heading -> key of a result
    "nodes": "nodes",
    "tok/step": "tokens_per_step",
    "plain ms": "plain_step_ms",
    "medusa ms": "medusa_step_ms",
    "overhead": "overhead",
    "speed-up": "speedup",
    "over best": "speedup_over_best",
    "tok/s": "tokens_per_second",
    "ttft ms": "ttft_ms",
    "host us": "host_us_per_step",
    "diverged": "divergences",
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each result; what all have in common stands in no column."""
    names = ["profile"]
    if len({(result["prompt_length"], result["max_new_tokens"]) for result in results}) > 1:
        names = ["prompt_length", "max_new_tokens", *names]
    if len({result["backend"] for result in results}) > 1:
        names = ["backend", *names]
    headings = [{"prompt_length": "prompt", "max_new_tokens": "new"}.get(name, name) for name in names]
    labels = [[_label(result[name]) for name in names] for result in results]
    widths = [max(map(len, column)) for column in zip(headings, *labels, strict=True)]
    figures = [[cell(_value(result[key])) for key in COLUMNS.values()] for result in results]
    lines = []
    for label, cells in zip([headings, *labels], [[*COLUMNS], *figures], strict=True):
        left = "  ".join(f"{text:<{width}}" for text, width in zip(label, widths, strict=True))
        lines.append(left + "".join(f"{text:>11}" for text in cells))
    return "\n".join(lines)


def categories(results: Sequence[dict[str, Any]]) -> str:
    """Tokens per step of every tree in every category, one backend's; "" where there are fewer than two categories."""
    results = [result for result in results if result["profile"] != PLAIN]
    if not results or len(results[0]["categories"]) < 2:
        return ""
    names = list(results[0]["categories"])
    width = max(len("tokens/step"), *map(len, names))
    columns = [max(11, len(result["profile"]) + 2) for result in results]
    heading = zip(results, columns, strict=True)
    lines = [f"{'tokens/step':<{width}}  prompts" + "".join(f"{one['profile']:>{size}}" for one, size in heading)]
    for name in names:
        found = [result["categories"][name] for result in results]
        cells = zip(found, columns, strict=True)
        line = "".join(f"{cell(one['tokens_per_step']):>{size}}" for one, size in cells)
        lines.append(f"{name:<{width}}{found[0]['prompts']:>9}{line}")
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A figure in three digits or so."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _value(figure: Any) -> float | None:
    """The figure itself, or the median of several."""
    value: float | None = figure["p50"] if isinstance(figure, dict) else figure
    return value


def _label(value: Any) -> str:
    return "-" if value is None else str(value)
