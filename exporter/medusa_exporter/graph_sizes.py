"""Measures how large the graphs of a bundle are together with the weights that they use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from medusa_runtime.backends.checked_graph import MAX_GRAPH
from medusa_runtime.backends.onnx_file import ExternalData, read_contents
from medusa_runtime.bundle import Bundle


@dataclass(frozen=True)
class GraphSize:
    """Sizes in bytes of what a backend loads for one precision.

    Some backends have several ONNX files for one precision, one for each kind of step. Weights that several of these
    files use count once.

    Attributes:
        files: Size of the ONNX files.
        weights: Size of the weights that the ONNX files refer to and that are stored next to them.
        shared_weights: The part of `weights` that graphs of other backends or precisions use too.
    """

    files: int
    weights: int
    shared_weights: int

    @property
    def size(self) -> int:
        """Size of the ONNX files and of all weights that they use."""
        return self.files + self.weights


def graph_sizes(bundle: Bundle) -> dict[str, GraphSize]:
    """Return the size of each graph of a bundle, by its key, e.g. "ort-cpu-int8". Raises BundleError."""
    listed = bundle.manifest.files
    files = {key: files_of_graph(key, listed) for key in bundle.manifest.graphs}
    stored = {key: {place for name in names for place in _weights(bundle, name)} for key, names in files.items()}
    users = Counter(place for places in stored.values() for place in places)
    return {
        key: GraphSize(
            files=sum(listed[name].size for name in files[key]),
            weights=sum(place.length for place in places),
            shared_weights=sum(place.length for place in places if users[place] > 1),
        )
        for key, places in stored.items()
    }


def files_of_graph(key: str, names: Iterable[str]) -> list[str]:
    """Return those ONNX files among the files of a bundle that belong to the graph `key`."""
    return [name for name in names if name.startswith((f"graphs/{key}.", f"graphs/{key}-")) and name.endswith(".onnx")]


def _weights(bundle: Bundle, name: str) -> list[ExternalData]:
    """Return where the weights are stored that an ONNX file refers to."""
    contents = read_contents(bundle.file(name).read(MAX_GRAPH), name)
    return [weight.external for weight in contents.weights if weight.external is not None]
