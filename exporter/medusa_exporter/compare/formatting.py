"""Shows a comparison's results: as a table, as one error line, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from medusa_exporter import console
from medusa_exporter.compare.summary import TensorResult

TEXTS = ("step", "tensors", "result", "where")  # headings of columns without figures
HEADINGS = ("step", "tensors", "largest error", "tolerance", "result", "where")


def table(rows: Sequence[TensorResult]) -> str:
    """Return a table of the worst result of each kind of step and group of tensors."""
    cells = [
        (one.kind, one.group, f"{one.error:.2e}", f"{one.tolerance:.2e}", "ok" if one.passed else "FAILS", one.where)
        for one in rows
    ]
    return console.table(HEADINGS, cells, text=TEXTS)


def mismatch(worst: TensorResult, first: TensorResult | None, reference: str, other: str) -> str:
    """Describe in one line the result furthest beyond its tolerance, and the first one beyond its own."""
    begins = "" if first is None else f"; the first is {first.name} of the {first.kind} step at {first.where}"
    return (
        f"{other} is not equal to {reference} within tolerance: worst is {worst.name} ({worst.group}) of the "
        f"{worst.kind} step at {worst.where}: error {worst.error:.2e}, expected at most {worst.tolerance:.2e}{begins}"
    )


def as_json(rows: Sequence[TensorResult]) -> list[dict[str, Any]]:
    """Return the rows as JSON objects; an error that is not finite becomes None, which JSON can represent."""
    return [asdict(one) | {"error": one.error if math.isfinite(one.error) else None} for one in rows]
