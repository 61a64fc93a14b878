"""Writes graphs beside each other, tensors that several of them use only once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir import external_data

from medusa_exporter.graph.memory import trim_heap

LEAST_BYTES = 256  # smaller tensors stay in the graph's own file


def save_graphs(graphs: dict[Path, ir.Model], shared: str) -> None:
    """Write each graph to its path, all in one folder, and its large tensors to `<path>.data`.

    shared: the name of the file for tensors that more than one of the graphs holds.
    """
    tensors = {path: _large(graph) for path, graph in graphs.items()}
    count = Counter(key for of_one in tensors.values() for key in of_one)
    common = {key: tensor for of_one in tensors.values() for key, tensor in of_one.items() if count[key] > 1}
    written = _write(common, next(iter(graphs)).with_name(shared))
    for path, graph in graphs.items():
        own = {key: tensor for key, tensor in tensors[path].items() if key not in common}
        places = written | _write(own, path.with_name(f"{path.name}.data"))
        for value in graph.graph.initializers.values():
            value.const_value = places.get(id(value.const_value), value.const_value)
        ir.save(graph, path)


def _large(graph: ir.Model) -> dict[int, ir.TensorProtocol]:
    """The large tensors of a graph by identity, in its own order."""
    found = (value.const_value for value in graph.graph.initializers.values())
    return {id(tensor): tensor for tensor in found if tensor is not None and tensor.nbytes > LEAST_BYTES}


def _write(tensors: dict[int, ir.TensorProtocol], file: Path) -> dict[int, ir.ExternalTensor]:
    if not tensors:
        return {}
    places = external_data.convert_tensors_to_external(list(tensors.values()), file.parent, file.name, _after_tensor)
    return dict(zip(tensors, places, strict=True))


def _after_tensor(_tensor: ir.TensorProtocol, _progress: object) -> None:
    """Return what making the tensors before this one took: else their memory would add up."""
    trim_heap()
