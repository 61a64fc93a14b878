"""Element types of tensors on a device: their size, ONNX's number for them, and the numpy type that stores them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medusa_runtime.errors import BundleError

INT32, BOOL = 6, 9  # numbers of ONNX's TensorProto.DataType


@dataclass(frozen=True)
class ElementType:
    """A floating-point type.

    Args:
        itemsize: Bytes of one element.
        onnx_type: Number of the type in ONNX's `TensorProto.DataType`.
        host_dtype: The numpy type that stores elements on the host; uint16 for bf16, which numpy lacks.
    """

    itemsize: int
    onnx_type: int
    host_dtype: DTypeLike

    def to_float32(self, array: NDArray[np.generic]) -> NDArray[np.float32]:
        """Convert an array of `host_dtype` to float32."""
        if array.dtype == np.uint16:  # bf16 is the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)


FLOAT32 = ElementType(4, 1, np.float32)  # hidden states and logits are float32 in every precision
KV_TYPES = {"fp32": FLOAT32, "fp16": ElementType(2, 10, np.float16), "bf16": ElementType(2, 16, np.uint16)}


def kv_type(precision: str) -> ElementType:
    """Return the element type of the KV cache for a precision. Raises BundleError if no GPU backend supports it."""
    if precision not in KV_TYPES:
        raise BundleError(
            f"precision {precision!r} does not run on a GPU; expected one of {', '.join(KV_TYPES)}: choose one of "
            "these, or the backend ort-cpu"
        )
    return KV_TYPES[precision]
