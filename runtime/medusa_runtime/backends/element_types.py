"""The types of what lies on a device, by ONNX's numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medusa_runtime.errors import BundleError

INT32, BOOL = 6, 9


@dataclass(frozen=True)
class Element:
    """A type of numbers: its bytes, ONNX's number for it, and the type of array that holds them on the host."""

    size: int
    onnx: int
    stored: DTypeLike

    def widened(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return numbers of this type, in an array of `stored`, as float32."""
        if stored.dtype == np.uint16:  # numpy knows no bf16, which is the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


FLOAT32 = Element(4, 1, np.float32)  # of hidden states and logits, whatever the precision
ELEMENTS = {"fp32": FLOAT32, "fp16": Element(2, 10, np.float16), "bf16": Element(2, 16, np.uint16)}  # of KV rows


def element(precision: str) -> Element:
    """Return the type of a precision's KV rows. Raises BundleError for one that no device backend runs."""
    if precision not in ELEMENTS:
        raise BundleError(f"precision {precision!r} does not run on a GPU; expected one of {', '.join(ELEMENTS)}")
    return ELEMENTS[precision]
