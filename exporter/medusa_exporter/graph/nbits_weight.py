"""Weights that are quantised as they are written: until then a graph holds the weight that they are made from alone."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from medusa_runtime.backends.ort_library import import_onnxruntime

from medusa_exporter.precisions import WeightFormat

COLUMNS = 512  # that are quantised at once: the library copies what it is given

Matrix = npt.NDArray[np.float32]
Read = Callable[[slice], Matrix]  # gives some columns of a weight (in, out)


class NBitsWeight:
    """A weight (in, out) as MatMulNBits takes it: `packed` (out, blocks, bytes of a block), `scales` (out, blocks).

    read: returns some columns; called whenever a tensor's values are asked for. Only the scales, which are small, are
    kept from then on. name: of the weight; those of the tensors begin with it.
    """

    def __init__(self, read: Read, shape: tuple[int, int], to: WeightFormat, name: str) -> None:
        self._read, self._to, self._name = read, to, name
        self._scales: Matrix | None = None
        rows, columns = shape
        blocks = -(-rows // to.block)
        self._shape = columns, blocks, to.block * to.bits // 8

    @property
    def packed(self) -> ir.LazyTensor:
        """The numbers, `bits` each, uint8."""
        name = f"{self._name}.q{self._to.bits}"
        return ir.LazyTensor(
            lambda: ir.tensor(self._quantise(), name=name),
            dtype=ir.DataType.UINT8,
            shape=ir.Shape(self._shape),
            name=name,
        )

    @property
    def scales(self) -> ir.LazyTensor:
        """The scale of each block, fp32."""
        name = f"{self._name}.q{self._to.bits}_scales"
        return ir.LazyTensor(
            lambda: ir.tensor(self._make_scales(), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(self._shape[:2]),
            name=name,
        )

    def _make_scales(self) -> Matrix:
        if self._scales is None:
            self._quantise()
        assert self._scales is not None  # noqa: S101 -- `_quantise` has just set them
        return self._scales

    def _quantise(self) -> npt.NDArray[np.uint8]:
        packed, scales = np.empty(self._shape, np.uint8), np.empty(self._shape[:2], np.float32)
        for first in range(0, self._shape[0], COLUMNS):
            some = slice(first, first + COLUMNS)
            packed[some], scales[some] = quantise_blocks(self._read(some), self._to)
        self._scales = scales
        return packed


def quantise_blocks(matrix: Matrix, to: WeightFormat) -> tuple[npt.NDArray[np.uint8], Matrix]:
    """Quantise (in, out), each column in blocks; return (out, blocks, bytes of a block) and (out, blocks) scales."""
    silent = logging.NullHandler()
    logging.root.addHandler(silent)  # or the library's import would set up logging for the whole process
    try:
        import_onnxruntime("export")
        library = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        logging.root.removeHandler(silent)
    config = library.DefaultWeightOnlyQuantConfig(to.block, is_symmetric=True, bits=to.bits)
    contiguous = np.ascontiguousarray(matrix, dtype=np.float32)
    packed, scales, _zero_points = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(contiguous)
    return packed, scales
