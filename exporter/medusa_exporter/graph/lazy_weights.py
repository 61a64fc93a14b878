"""Weights that are made of other weights when they are read, whole or in parts, so that no copy is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

EVERY = slice(None)


class SelectedRows(ir.LazyTensor):
    """Some rows of a weight, in fp32.

    For example, with `selected` = [7, 0, 3] the tensor has 3 rows: rows 7, 0 and 3 of the weight.

    Args:
        weight: (V, H).
        selected: (D,) indices of rows, in the order in which the tensor has them.
        name: The tensor's name.
    """

    def __init__(self, weight: torch.Tensor, selected: torch.Tensor, name: str) -> None:
        self._weight, self._selected = weight.detach(), selected
        shape = ir.Shape([len(selected), weight.shape[1]])
        super().__init__(lambda: ir.tensor(self.rows(), name=name), dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def rows(self, some: slice = EVERY) -> NDArray[np.float32]:
        """Return a copy of some of the rows."""
        copied: NDArray[np.float32] = self._weight[self._selected[some]].float().numpy()
        return copied


class ConcatenatedColumns(ir.LazyTensor):
    """Tensors concatenated along their last axis.

    Args:
        tensors: Tensors of one type whose shapes differ in the last axis only.
        name: The name of the result.
    """

    def __init__(self, tensors: Sequence[ir.TensorProtocol], name: str) -> None:
        self._tensors = tensors
        widths = [tensor.shape.numpy()[-1] for tensor in tensors]
        shape = ir.Shape((*tensors[0].shape.numpy()[:-1], sum(widths)))
        super().__init__(lambda: ir.tensor(self.columns(), name=name), tensors[0].dtype, shape, name=name)

    def columns(self, some: slice = EVERY) -> NDArray[Any]:
        """Return a copy of some of the columns; the slice has no step.

        For example, `slice(3, 7)` of two tensors of 5 columns each is columns 3 and 4 of the first and 0 and 1 of the
        second.
        """
        first, last, _ = some.indices(self.shape.numpy()[-1])
        parts: list[NDArray[Any]] = []
        for tensor in self._tensors:
            part = tensor.numpy()[..., max(first, 0) : max(last, 0)]
            first, last = first - tensor.shape.numpy()[-1], last - tensor.shape.numpy()[-1]
            parts.append(part)
        return np.concatenate(parts, axis=-1)
