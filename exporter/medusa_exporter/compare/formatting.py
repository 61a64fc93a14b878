"""What a comparison found, as a table, as one line, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from medusa_exporter.compare.summary import TensorResult

HEADINGS = ("step", "tensors", "largest error", "tolerance", "", "where")


def table(rows: Sequence[TensorResult]) -> str:
    """Lay out the worst finding of each group."""
    cells = [HEADINGS] + [
        (one.kind, one.group, f"{one.error:.2e}", f"{one.tolerance:.2e}", "ok" if one.passed else "FAILS", one.where)
        for one in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(map(str.rstrip, lines))


def mismatch(one: TensorResult, first: TensorResult | None, reference: str, other: str) -> str:
    """Say in one line what is furthest beyond its tolerance, where that is, and what was the first beyond its own."""
    begins = "" if first is None else f"; the first is {first.name} of the {first.kind} step at {first.where}"
    return (
        f"{other} is not equal to {reference} within tolerance: worst is {one.name} ({one.group}) of the {one.kind} "
        f"step at {one.where}: error {one.error:.2e}, at most {one.tolerance:.2e}{begins}"
    )


def as_json(rows: Sequence[TensorResult]) -> list[dict[str, Any]]:
    """Return the rows as JSON can say them: an error that is not finite is None."""
    return [asdict(one) | {"error": one.error if math.isfinite(one.error) else None} for one in rows]
