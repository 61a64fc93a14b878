"""Rows of a torch weight that are copied when they are asked for, some at a time where that is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

EVERY = slice(None)


class PickedRows(ir.LazyTensor):
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
