"""Checks of a backend's logits: a graph whose values overflow computes NaN, infinite or equal logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import Backend, FloatArray
from medusa_runtime.errors import InvalidLogitsError


def read_finite_logits(backend: Backend, row: int, where: str) -> FloatArray:
    """Return row `row` of the last step's logits, (V,).

    Args:
        backend: The backend that ran the step.
        row: Index of the row, 0 to R - 1.
        where: The place of the row, for the error message.

    Raises:
        InvalidLogitsError: A logit is not finite.
    """
    logits, _ = _read_finite(backend, row, where)
    return logits


def check_prompt_logits(backend: Backend, ids: NDArray[np.int64]) -> None:
    """Check the logits after a prompt of `ids`.

    Equal logits are invalid too, except for a prompt of one repeated token: a padding token's embedding is 0, and so
    is everything computed from it.

    Raises:
        InvalidLogitsError: The logits are not finite, or all are equal.
    """
    where = f"at row {ids.size - 1} of the prompt"
    _, (least, most) = _read_finite(backend, 0, where)
    if least == most and ids.min() < ids.max():
        raise _error(backend, least, most, where)


def _read_finite(backend: Backend, row: int, where: str) -> tuple[FloatArray, tuple[float, float]]:
    """Return the logits of a row, (V,), and the least and the most of them."""
    logits = backend.read_logits(row)
    least, most = logits.min(), logits.max()
    if not (-np.inf < least and most < np.inf):
        raise _error(backend, least, most, where)
    return logits, (least, most)


def _error(backend: Backend, least: float, most: float, where: str) -> InvalidLogitsError:
    return InvalidLogitsError(
        f"{backend.name} computed logits from {least} to {most} {where} in {backend.precision}: expected finite "
        "logits that differ; find the first wrong tensor with medusa-export compare, or use another precision"
    )
