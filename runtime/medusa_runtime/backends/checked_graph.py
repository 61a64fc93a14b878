"""A graph and its external weights, checked before ONNX Runtime gets them.

ONNX Runtime is never given a path, only bytes that were compared with the bundle's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnx_file import ExternalData, OnnxContents, Weight, read_contents
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError
from medusa_runtime.verified_file import VerifiedFile

MAX_GRAPH = 256 << 20  # bytes of an ONNX file; large weights are in files next to it
DOMAINS = ("", "ai.onnx", "com.microsoft")  # domains of the operators that are part of ONNX Runtime
FILE_OPERATORS = ("EPContext",)  # operators that open files themselves
# ONNX's type number -> numpy type; bfloat16 (16) is stored as its bits
NUMPY_TYPES: dict[int, type[np.generic]] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    16: np.uint16,
}


class CheckedGraph:
    """An ONNX file and the files next to it that hold its weights.

    Attributes:
        path: Path of the ONNX file.
        data: Its bytes.
        contents: Its weights and operators.
    """

    def __init__(self, path: Path, bundle: Bundle | None = None) -> None:
        """Read and check a graph.

        Args:
            path: Path of the ONNX file.
            bundle: The bundle whose manifest lists the graph and its weights. With None the files are not compared with
                any manifest.

        Raises:
            BundleError: The graph or a file of weights is not what the manifest lists; a weight does not have the size
                that its shape needs, or is beyond the end of its file, or overlaps another one; or an operator is not
                part of ONNX Runtime.
        """
        self.path = path
        self._bundle = bundle
        self.data = self._file(path.name).read(MAX_GRAPH)
        self.contents: OnnxContents = read_contents(self.data, str(path))
        self._files = {name: self._file(name) for name in sorted({external.file for external in self._externals()})}
        self._check_operators()
        for weight in self.contents.weights:
            if weight.external:
                self._check_weight(weight, weight.external)
        self._check_overlaps()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in the ONNX file and next to it; weights that share their data count once."""
        inline = sum(weight.inline_bytes for weight in self.contents.weights)
        return inline + sum(external.length for external in self._externals())

    @contextmanager
    def mapped(self) -> Iterator[dict[str, tuple[Weight, NDArray[np.generic]]]]:
        """Map the files of the external weights into memory, and hash them meanwhile, unless that was done before.

        What was made of the weights may be used only after the context, which ends with an error for a damaged file.

        Yields:
            Each external weight and its array, by name.

        Raises:
            BundleError: A file is damaged or was changed.
        """
        with ExitStack() as stack:
            files = {name: stack.enter_context(self._file(name).mapped()) for name in self._files}
            yield {
                weight.name: (weight, _array(weight, weight.external, files[weight.external.file]))
                for weight in self.contents.weights
                if weight.external
            }

    def _externals(self) -> set[ExternalData]:
        return {weight.external for weight in self.contents.weights if weight.external}

    def _file(self, name: str) -> VerifiedFile:
        return (
            VerifiedFile(self.path.parent / name)
            if self._bundle is None
            else self._bundle.file(self._listed_name(name))
        )

    def _listed_name(self, name: str) -> str:
        """Return the name in the bundle's manifest of a file next to the graph's."""
        assert self._bundle is not None  # noqa: S101 -- asked only of a bundle's graph
        return (self.path.parent / name).relative_to(self._bundle.root).as_posix()

    def _check_operators(self) -> None:
        for domain, operator in sorted(self.contents.operators):
            if domain not in DOMAINS or operator in FILE_OPERATORS:
                raise BundleError(
                    f"{self.path} has the operator {operator!r:.80} of domain {domain!r:.80}, expected operators of "
                    f"{', '.join(map(repr, DOMAINS))} that read no files; build it again"
                )

    def _check_weight(self, weight: Weight, external: ExternalData) -> None:
        if weight.onnx_type not in NUMPY_TYPES:
            raise BundleError(
                f"{self.path}: {weight.name} has ONNX's type {weight.onnx_type}, expected one of "
                f"{sorted(NUMPY_TYPES)} in a file of weights; build it again"
            )
        size = math.prod(weight.shape) * np.dtype(NUMPY_TYPES[weight.onnx_type]).itemsize
        if size != external.length:
            raise BundleError(
                f"{self.path}: {weight.name} {weight.shape} has {external.length} bytes, expected {size}; "
                "build it again"
            )
        if external.offset + external.length > self._files[external.file].size:
            raise BundleError(
                f"{self.path}: {weight.name} cannot be read at {external}, the file has "
                f"{self._files[external.file].size} bytes; build it again"
            )

    def _check_overlaps(self) -> None:
        previous = None
        for external in sorted(self._externals()):
            if previous and previous.file == external.file and external.offset < previous.offset + previous.length:
                raise BundleError(
                    f"{self.path}: the weights at {previous} and {external} overlap, expected separate or identical "
                    "data; build it again"
                )
            previous = external


def _array(weight: Weight, external: ExternalData, file: NDArray[np.uint8]) -> NDArray[np.generic]:
    raw = file[external.offset : external.offset + external.length]
    dtype = np.dtype(NUMPY_TYPES[weight.onnx_type])
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()  # elements must be aligned to their size; unaligned tensors are small
    return raw.view(dtype).reshape(weight.shape)
