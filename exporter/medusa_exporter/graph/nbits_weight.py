"""Weights in 8 or 4 bits for MatMulNBits, quantised while they are written: a graph holds the original weight only."""

from __future__ import annotations

import importlib
import logging
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from medusa_runtime.backends.ort_library import import_onnxruntime

from medusa_exporter.graph.weight_columns import ReadColumns
from medusa_exporter.precisions import WeightFormat

COLUMNS_AT_ONCE = 512  # quantised per call: the library copies its input

Matrix = npt.NDArray[np.float32]


class NBitsWeight:
    """A weight (in, out) as MatMulNBits reads it.

    `packed` is (out, blocks, bytes per block) and `scales` (out, blocks); graphs can share both. For example, a weight
    (576, 1536) in 4 bits with blocks of 32 has 18 blocks per column: `packed` is (1536, 18, 16), `scales` (1536, 18).

    Args:
        read: Returns some columns of the weight. It is called whenever the values of `packed` or `scales` are read; the
            scales, which are small, are kept from then on.
        shape: (in, out).
        to: Bits and block size.
        name: The weight's name, with which the names of both tensors begin.
    """

    def __init__(self, read: ReadColumns, shape: tuple[int, int], to: WeightFormat, name: str) -> None:
        self._read, self._to, self._name = read, to, name
        self._scales: Matrix | None = None
        rows, columns = shape
        blocks = -(-rows // to.block)
        self._shape = columns, blocks, to.block * to.bits // 8

    @cached_property
    def packed(self) -> ir.LazyTensor:
        """The quantised values, uint8: one (8 bits) or two (4 bits) per byte."""
        name = f"{self._name}.q{self._to.bits}"
        return ir.LazyTensor(
            lambda: ir.tensor(self._quantise(), name=name),
            dtype=ir.DataType.UINT8,
            shape=ir.Shape(self._shape),
            name=name,
        )

    @cached_property
    def scales(self) -> ir.LazyTensor:
        """The scale of each block, fp32."""
        name = f"{self._name}.q{self._to.bits}_scales"
        return ir.LazyTensor(
            lambda: ir.tensor(self._read_scales(), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(self._shape[:2]),
            name=name,
        )

    def _read_scales(self) -> Matrix:
        if self._scales is None:
            self._quantise()
        assert self._scales is not None  # noqa: S101 -- `_quantise` has just set them
        return self._scales

    def _quantise(self) -> npt.NDArray[np.uint8]:
        packed, scales = np.empty(self._shape, np.uint8), np.empty(self._shape[:2], np.float32)
        for first in range(0, self._shape[0], COLUMNS_AT_ONCE):
            some = slice(first, first + COLUMNS_AT_ONCE)
            packed[some], scales[some] = quantise_blocks(self._read(some), self._to)
        self._scales = scales
        return packed


def quantise_blocks(matrix: Matrix, to: WeightFormat) -> tuple[npt.NDArray[np.uint8], Matrix]:
    """Quantise a matrix (in, out), each column in blocks, symmetrically around zero.

    Returns:
        The packed values (out, blocks, bytes per block) and the scales (out, blocks).
    """
    handler = logging.NullHandler()
    logging.root.addHandler(handler)  # without a handler the library's import would configure the root logger
    try:
        import_onnxruntime("export")
        library = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        logging.root.removeHandler(handler)
    config = library.DefaultWeightOnlyQuantConfig(to.block, is_symmetric=True, bits=to.bits)
    contiguous = np.ascontiguousarray(matrix, dtype=np.float32)
    packed, scales, _zero_points = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(contiguous)
    return packed, scales
