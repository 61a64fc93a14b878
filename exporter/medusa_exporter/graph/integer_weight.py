"""A weight in 8-bit integers, one scale a column, quantised while it is written: a graph holds the original only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medusa_exporter.graph.weight_columns import ReadColumns, read_columns

WEIGHT_LIMIT = 127  # the largest magnitude of a weight
MIN_MAGNITUDE = 1e-12  # of a column, so that no scale is 0
COLUMNS_AT_ONCE = 4096

Vector = NDArray[np.float32]


class IntegerWeight:
    """A weight (in, out) as MatMulIntegerToFloat reads it.

    Args:
        read: Returns some columns of the weight.
        shape: (in, out).
        name: The name of `values`.

    Attributes:
        rows: (in,) the largest magnitude of each row.
        columns: (out,) the largest magnitude of each column.
    """

    def __init__(self, read: ReadColumns, shape: tuple[int, int], name: str) -> None:
        self._read, self._shape, self._name = read, shape, name
        self._factors: Vector | None = None
        self.rows, self.columns = self._magnitudes()

    @classmethod
    def of(cls, node: ir.Node, name: str) -> IntegerWeight:
        """Return the weight of a MatMul or of a Gemm with transB, as `torch.nn.Linear` is exported."""
        return cls(*read_columns(node), name)

    def multiply_rows(self, factors: Vector) -> None:
        """Multiply the rows (in,) before they are quantised."""
        self._factors = factors
        self.rows, self.columns = self._magnitudes()

    @property
    def scales(self) -> Vector:
        """The scale of each column (out,)."""
        scales: Vector = (np.maximum(self.columns, MIN_MAGNITUDE) / WEIGHT_LIMIT).astype(np.float32)
        return scales

    @property
    def values(self) -> ir.LazyTensor:
        """The quantised weight, int8 (in, out)."""

        def read() -> ir.TensorProtocol:
            quantised, scales = np.empty(self._shape, np.int8), self.scales
            for some in self._slices():
                quantised[:, some] = np.round(self._columns(some) / scales[some])
            return ir.tensor(quantised, name=self._name)

        return ir.LazyTensor(read, dtype=ir.DataType.INT8, shape=ir.Shape(self._shape), name=self._name)

    def _magnitudes(self) -> tuple[Vector, Vector]:
        rows, columns = np.zeros(self._shape[0], np.float32), np.zeros(self._shape[1], np.float32)
        for some in self._slices():
            part = np.abs(self._columns(some))
            columns[some] = part.max(axis=0)
            np.maximum(rows, part.max(axis=1), out=rows)
        return rows, columns

    def _columns(self, some: slice) -> Vector:
        part = self._read(some)
        return part if self._factors is None else part * self._factors[:, None]

    def _slices(self) -> list[slice]:
        return [slice(first, first + COLUMNS_AT_ONCE) for first in range(0, self._shape[1], COLUMNS_AT_ONCE)]
