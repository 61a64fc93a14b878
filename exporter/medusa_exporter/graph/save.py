"""Saves several graphs into one folder; tensors that more than one of them uses are written once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
from medusa_runtime.heap import trim_heap
from onnx_ir import external_data

MIN_EXTERNAL_BYTES = 256  # smaller tensors are written into the graph's own file


def save_graphs(graphs: dict[Path, ir.Model], shared: str) -> None:
    """Write each graph to its path, and its large tensors to `<path>.data`.

    Args:
        graphs: The graphs by path; all paths are in one folder.
        shared: The name of the file for large tensors that more than one graph uses.
    """
    tensors = {path: _large_tensors(graph) for path, graph in graphs.items()}
    count = Counter(key for of_one in tensors.values() for key in of_one)
    common = {key: tensor for of_one in tensors.values() for key, tensor in of_one.items() if count[key] > 1}
    written = _write(common, next(iter(graphs)).with_name(shared))
    for path, graph in graphs.items():
        own = {key: tensor for key, tensor in tensors[path].items() if key not in common}
        external = written | _write(own, path.with_name(f"{path.name}.data"))
        for value in graph.graph.initializers.values():
            value.const_value = external.get(id(value.const_value), value.const_value)
        ir.save(graph, path)


def _large_tensors(graph: ir.Model) -> dict[int, ir.TensorProtocol]:
    """Return the large tensors of a graph by identity, in the graph's order."""
    tensors = (value.const_value for value in graph.graph.initializers.values())
    return {id(tensor): tensor for tensor in tensors if tensor is not None and tensor.nbytes > MIN_EXTERNAL_BYTES}


def _write(tensors: dict[int, ir.TensorProtocol], file: Path) -> dict[int, ir.ExternalTensor]:
    """Write tensors to a file and return references to it, by the identity of the original tensor."""
    if not tensors:
        return {}
    external = external_data.convert_tensors_to_external(list(tensors.values()), file.parent, file.name, _before_tensor)
    return dict(zip(tensors, external, strict=True))


def _before_tensor(_tensor: ir.TensorProtocol, _progress: object) -> None:
    """Free the memory that the previous tensors were computed in, which would otherwise add up."""
    trim_heap()
