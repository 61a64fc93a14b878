"""Reads rows of logits of the last step, and raises an error for rows that are not finite.

A graph whose values overflow computes NaN, infinite or equal logits. No token may be chosen from such a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from medusa_runtime.errors import InvalidLogitsError

if TYPE_CHECKING:
    from medusa_runtime.backends.base import Backend, FloatArray, RowSummary


class RowReader(Protocol):
    """Reads rows of a step on demand: a rule that needs few rows copies no others from the device."""

    def __call__(self, row: int, /) -> FloatArray:
        """Return the logits at row `row`, (V,) float32, all finite; valid until the next step."""

    def summary(self, row: int, /) -> RowSummary | None:
        """Return the summary of row `row`, None if the backend computed none.

        All logits of the row are finite. Where `finite` is false, only their sum overflows.
        """


class StepRows:
    """Rows of a backend's last step; each is checked once, on its first use.

    Args:
        backend: The backend that ran the step.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._checked: set[int] = set()
        self._where, self._first = "of the last step", 0

    def begin(self, where: str, first: int = 0) -> None:
        """Read rows of a new step.

        Args:
            where: Names the step in error messages.
            first: Number of its row 0 there.
        """
        self._checked.clear()
        self._where, self._first = where, first

    def __call__(self, row: int, /) -> FloatArray:
        """Return the logits at row `row`, (V,) float32. Raises InvalidLogitsError if one is not finite."""
        logits = self._backend.read_logits(row)
        if row not in self._checked and not self._is_finite(row):
            least, most = logits.min(), logits.max()
            if not (-np.inf < least and most < np.inf):
                raise self._error(row, f"from {least} to {most}")
            self._checked.add(row)
        return logits

    def _is_finite(self, row: int) -> bool:
        """Whether the device has found that all logits of a row are finite; the host has no such flags."""
        if self._backend.logits_on_host or not self._backend.read_finite(row):
            return False
        self._checked.add(row)
        return True

    def summary(self, row: int, /) -> RowSummary | None:
        """Return the summary of row `row`, None without one. Raises InvalidLogitsError if a logit is not finite."""
        found = None if self._backend.logits_on_host else self._backend.read_summary(row)
        if found is not None:
            self.check(row)
        return found

    def check(self, row: int) -> None:
        """Raise InvalidLogitsError if a logit of row `row` is not finite; a backend with flags copies no row for it."""
        if row not in self._checked and not self._is_finite(row):
            self(row)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Check the logits after a prompt.

        Equal logits are invalid too, except for a prompt of one repeated token: a padding token's embedding is 0, and
        so is everything computed from it.

        Raises:
            InvalidLogitsError: The logits are not finite, or all are equal.
        """
        logits = self(0)
        least, most = logits.min(), logits.max()
        if least == most and min(prompt) < max(prompt):
            raise self._error(0, f"from {least} to {most}")

    def save(self, row: int) -> SavedRow:
        """Return a copy of row `row` that later steps do not change."""
        found = self.summary(row)
        summary = None if found is None else found._replace(ids=found.ids.copy(), logits=found.logits.copy())
        return SavedRow(self(row).copy(), summary)

    def _error(self, row: int, values: str) -> InvalidLogitsError:
        return InvalidLogitsError(
            f"{self._backend.name} computed logits {values} at row {self._first + row} {self._where} in "
            f"{self._backend.precision}: expected finite logits that differ; find the first wrong tensor with "
            "medusa-export compare, or use another precision"
        )


class SavedRow:
    """One row that was copied: a `RowReader` of row 0 alone."""

    def __init__(self, logits: FloatArray, summary: RowSummary | None) -> None:
        self._logits, self._summary = logits, summary

    def __call__(self, row: int, /) -> FloatArray:  # noqa: ARG002
        """Return the logits, (V,) float32."""
        return self._logits

    def summary(self, row: int, /) -> RowSummary | None:  # noqa: ARG002
        """Return the summary, None if the backend computed none."""
        return self._summary
