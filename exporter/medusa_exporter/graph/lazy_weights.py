"""Weights made of other weights: copied when they are asked for, a part at a time where that is enough."""

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
    """The rows `picked` (D,) of a weight (V, H), in that order, in fp32; no copy is held.

    name: of the tensor.
    """

    def __init__(self, weight: torch.Tensor, picked: torch.Tensor, name: str) -> None:
        self._weight, self._picked = weight.detach(), picked
        shape = ir.Shape([len(picked), weight.shape[1]])
        super().__init__(lambda: ir.tensor(self.rows(), name=name), dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def rows(self, some: slice = EVERY) -> NDArray[np.float32]:
        """Copy some of the rows."""
        copied: NDArray[np.float32] = self._weight[self._picked[some]].float().numpy()
        return copied


class ConcatenatedColumns(ir.LazyTensor):
    """Tensors next to each other along their last axis; no copy is held.

    name: of the tensor.
    """

    def __init__(self, tensors: Sequence[ir.TensorProtocol], name: str) -> None:
        self._tensors = tensors
        widths = [tensor.shape.numpy()[-1] for tensor in tensors]
        shape = ir.Shape((*tensors[0].shape.numpy()[:-1], sum(widths)))
        super().__init__(lambda: ir.tensor(self.columns(), name=name), tensors[0].dtype, shape, name=name)

    def columns(self, some: slice = EVERY) -> NDArray[Any]:
        """Copy some of the columns; `some` has no step."""
        first, last, _ = some.indices(self.shape.numpy()[-1])
        parts: list[NDArray[Any]] = []
        for tensor in self._tensors:
            part = tensor.numpy()[..., max(first, 0) : max(last, 0)]
            first, last = first - tensor.shape.numpy()[-1], last - tensor.shape.numpy()[-1]
            parts.append(part)
        return np.concatenate(parts, axis=-1)
