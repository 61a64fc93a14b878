"""The largest elements of a row, without sorting it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import FloatArray

_ROWS = 32  # elements of each group whose maximum is taken first


def kth_largest(values: FloatArray, k: int) -> float:
    """Return the k-th largest element, equal ones counted each.

    The maxima of groups come first: at least k elements reach the k-th largest of these, and little more than k do.

    Args:
        values: (n,) without NaN.
        k: From 1 to n.
    """
    groups = len(values) // _ROWS
    if k <= groups:
        maxima = values[: groups * _ROWS].reshape(_ROWS, groups).max(axis=0)
        values = values[values >= _kth(maxima, k)]
    return float(_kth(values, k))


def _kth(values: FloatArray, k: int) -> np.float32:
    largest: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return largest


def top_ids(values: FloatArray, k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest elements, the largest first, equal ones in ascending order.

    Args:
        values: (n,) without NaN.
        k: From 0 to n.
    """
    if k == 0:
        return np.zeros(0, dtype=np.intp)
    found = np.flatnonzero(values >= np.float32(kth_largest(values, k)))
    return found[np.argsort(-values[found], kind="stable")][:k]
