"""A graph and its weights on their way into ONNX Runtime: only bytes that were checked, and no path that it opens."""

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
from medusa_runtime.verified import CheckedFile

MAX_GRAPH = 256 << 20  # bytes of an ONNX file; large tensors lie beside it
DOMAINS = ("", "ai.onnx", "com.microsoft")  # of operators that ONNX Runtime brings along
OUTSIDE = ("EPContext",)  # operators that open files of their own
# ONNX's numbers of types to numpy's; bfloat16 (16) is held as its bits
TYPES: dict[int, type[np.generic]] = {
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
    """An ONNX file and the files beside it that hold its weights; those of a bundle as its manifest lists them.

    data: the graph's bytes. contents: what they say. Raises BundleError for a graph that claims what does not hold:
    weights in a file that the manifest does not list, beyond its end, of another size than their shape takes, or across
    each other; operators that are not ONNX Runtime's own.
    """

    def __init__(self, path: Path, bundle: Bundle | None = None) -> None:
        """Read and check the graph. bundle: where it is listed; None takes the files as they are."""
        self.path = path
        self._bundle = bundle
        self.data = self._file(path.name).read(MAX_GRAPH)
        self.contents: OnnxContents = read_contents(self.data, str(path))
        self._files = {name: self._file(name) for name in sorted({place.file for place in self._places()})}
        self._check_operators()
        for weight in self.contents.weights:
            if weight.place:
                self._check_weight(weight, weight.place)
        self._check_overlaps()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in the graph's file and beside it; those that share a place count once."""
        inside = sum(weight.inside for weight in self.contents.weights)
        return inside + sum(place.length for place in self._places())

    @contextmanager
    def mapped(self) -> Iterator[dict[str, tuple[Weight, NDArray[np.generic]]]]:
        """Map the weights that lie beside the graph, by name, each of its shape; they lie in files that were checked.

        Raises BundleError if a file is not what was checked, at the beginning or at the end.
        """
        with ExitStack() as stack:
            files = {name: stack.enter_context(file.mapped()) for name, file in self._files.items()}
            yield {
                weight.name: (weight, _array(weight, weight.place, files[weight.place.file]))
                for weight in self.contents.weights
                if weight.place
            }

    def _places(self) -> set[ExternalData]:
        return {weight.place for weight in self.contents.weights if weight.place}

    def _file(self, name: str) -> CheckedFile:
        path = self.path.parent / name
        if self._bundle is None:
            return CheckedFile(path)
        return self._bundle.file(path.relative_to(self._bundle.root).as_posix())

    def _check_operators(self) -> None:
        for domain, operator in sorted(self.contents.operators):
            if domain not in DOMAINS or operator in OUTSIDE:
                raise BundleError(
                    f"{self.path} has the operator {operator!r:.80} of domain {domain!r:.80}, expected operators of "
                    f"{', '.join(map(repr, DOMAINS))} that read no files; build it again"
                )

    def _check_weight(self, weight: Weight, place: ExternalData) -> None:
        if weight.dtype not in TYPES:
            raise BundleError(f"{self.path}: {weight.name} is of ONNX's type {weight.dtype}, which lies in no file")
        size = math.prod(weight.shape) * np.dtype(TYPES[weight.dtype]).itemsize
        if size != place.length:
            raise BundleError(
                f"{self.path}: {weight.name} {weight.shape} does not take {place.length} bytes, expected {size}; "
                "build it again"
            )
        if place.offset + place.length > self._files[place.file].size:
            raise BundleError(
                f"{self.path}: {weight.name} cannot be read at {place}, the file has {self._files[place.file].size} "
                "bytes; build it again"
            )

    def _check_overlaps(self) -> None:
        before = None
        for place in sorted(self._places()):
            if before and before.file == place.file and place.offset < before.offset + before.length:
                raise BundleError(f"{self.path}: weights lie across each other at {before} and {place}; build it again")
            before = place


def _array(weight: Weight, place: ExternalData, file: NDArray[np.uint8]) -> NDArray[np.generic]:
    raw = file[place.offset : place.offset + place.length]
    dtype = np.dtype(TYPES[weight.dtype])
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()  # processors read no element across its boundary; such tensors are small
    return raw.view(dtype).reshape(weight.shape)
