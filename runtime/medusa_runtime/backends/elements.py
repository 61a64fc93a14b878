"""The types of what lies on a device, by ONNX's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.errors import BundleError

INT32, BOOL = 6, 9


@dataclass(frozen=True)
class Element:
    """A type of numbers: its bytes, and ONNX's number for it."""

    size: int
    onnx: int


FLOAT32 = Element(4, 1)  # of hidden states and logits, whatever the precision
ELEMENTS = {"fp32": FLOAT32, "fp16": Element(2, 10), "bf16": Element(2, 16)}  # of KV rows


def element(precision: str) -> Element:
    """Return the type of a precision's KV rows. Raises BundleError for one that no device backend runs."""
    if precision not in ELEMENTS:
        raise BundleError(f"precision {precision!r} does not run on a GPU; expected one of {', '.join(ELEMENTS)}")
    return ELEMENTS[precision]
