"""One trace, a dialect for each backend: which rewrites lead from the traced graph to the one that a backend runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from medusa_runtime.facts import ModelFacts
from numpy.typing import NDArray

from medusa_exporter.engines.step_sizes import StepSize, causal_file, graph_file, in_place_on_gpu
from medusa_exporter.graph.attention_masks import cast_masks
from medusa_exporter.graph.calibration import measure_ranges
from medusa_exporter.graph.cast_precision import DTYPES, cast_precision
from medusa_exporter.graph.causal import causal_graph
from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.decompose import decompose_all, decompose_attention, softcap_of
from medusa_exporter.graph.freeze_shapes import freeze_shapes, run_all_heads
from medusa_exporter.graph.fuse import fuse, merge_matmuls
from medusa_exporter.graph.in_place_kv import write_kv_in_place
from medusa_exporter.graph.logits import single_sequence_logits
from medusa_exporter.graph.quantise import quantise_draft, with_precision
from medusa_exporter.graph.stack_layers import stack_layers
from medusa_exporter.graph.topk import two_stage_topk
from medusa_exporter.precisions import DRAFT


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph and what its variants need to know.

    state_size: S. heads: how many there are. angles: the decoder's, from `rotary_tables`. windowed: whether
    some layers see the nearest rows alone. texts: what activations are measured on, where a precision fixes their
    scales. scratch: folder that a copy of the weights may lie in for a while; None for the system's.
    """

    graph: ir.Model
    facts: ModelFacts
    state_size: int
    heads: int
    angles: tuple[NDArray[np.float32], NDArray[np.float32]]
    windowed: bool = False
    texts: Sequence[Sequence[int]] = ()
    scratch: Path | None = None


def make_graphs(
    traced: TracedGraph, pairs: Iterable[tuple[str, str]], steps: Iterable[StepSize], fused: Container[str] = ()
) -> tuple[dict[str, ir.Model], dict[str, StepSize]]:
    """Return the graph of each file, and the size of step that it is fixed to, if it is.

    pairs: backends and precisions. steps: what TensorRT gets a graph for. fused: backends of which it gets one of fused
    operators. Graphs share the tensors that they have in common.
    """
    pairs = list(pairs)
    on_cpu = ort_cpu_graphs(traced, [precision for backend, precision in pairs if backend == "ort-cpu"])
    graphs = {graph_file("ort-cpu", precision): graph for precision, graph in on_cpu.items()}
    sizes: dict[str, StepSize] = {}
    on_gpu = [pair for pair in pairs if pair[0] != "ort-cpu"]
    if not on_gpu:
        return graphs, sizes
    gpu = GpuVariants(traced)
    for backend, precision in on_gpu:
        if backend == "ort-cuda":
            graph = graphs[graph_file(backend, precision)] = gpu.ort_cuda(precision)
            if in_place_on_gpu(precision) and not traced.windowed:
                graphs[causal_file(backend, precision)] = causal_graph(graph)
        else:
            for size in steps:
                file = graph_file(backend, precision, size)
                graphs[file], sizes[file] = gpu.tensorrt(precision, size, fused=backend in fused), size
    return graphs, sizes


def ort_cpu_graphs(traced: TracedGraph, precisions: Sequence[str]) -> dict[str, ir.Model]:
    """Give the CPU's graph in each precision: rows in place, fused operators, quantised weights."""
    if not precisions:
        return {}
    graph = traced.graph.clone()
    write_kv_in_place(graph, traced.facts, traced.state_size, traced.angles)
    fuse(graph)
    quantise_draft(graph, DRAFT)
    model = traced.facts, traced.state_size
    ranges = measure_ranges(graph, *model, traced.texts, traced.scratch) if traced.texts else {}
    return {precision: with_precision(graph, precision, ranges) for precision in precisions}


class GpuVariants:
    """The variants of GPU backends; graphs of one precision share its weights.

    All heads run: a count that the graph makes would have to come back to the host, and no CUDA graph be captured.
    """

    def __init__(self, traced: TracedGraph) -> None:
        """Take what was traced; its graph stays as it is."""
        self._traced, self._graph = traced, traced.graph.clone()
        run_all_heads(self._graph, traced.heads)
        self._cast_graphs: dict[str, ir.Model] = {}
        self._merged_graphs: dict[str, ir.Model] = {}
        cos, sin = traced.angles
        self._angles = ir.tensor(cos), ir.tensor(sin)  # once for all graphs that read them

    def ort_cuda(self, precision: str) -> ir.Model:
        """Give the graph for ONNX Runtime: few, fused operators.

        In 16 bits keys and values are written in place. The operator that does so knows no fp32: there attention is
        spelt out, for `Attention` itself has a slow kernel for more than one row under a mask.
        """
        graph, traced = self.cast(precision).clone(), self._traced
        if in_place_on_gpu(precision):
            write_kv_in_place(graph, traced.facts, traced.state_size, traced.angles, DTYPES[precision])
            single_sequence_logits(graph)
        else:
            decompose_attention(graph)
        fuse(graph)
        return graph

    def tensorrt(self, precision: str, size: StepSize, *, fused: bool = False) -> ir.Model:
        """Give the graph that TensorRT reads for one size of step: rows together, only P left open.

        fused: whether attention, norms and ropes stay one operator each, or are spelt out, as every version reads them.
        """
        graph = freeze_shapes(self._merged(precision), size.sizes)
        stack_layers(graph.graph, self._traced.facts.layers)
        two_stage_topk(graph.graph)
        if fused:
            if any(softcap_of(node) for node in graph.graph):  # which TensorRT's own attention does not know
                decompose_attention(graph, size.nodes)
            cast_masks(graph.graph)
            strip_metadata(graph)
        else:
            decompose_all(graph, size.nodes, self._traced.facts.context, self._angles)
        return graph

    def _merged(self, precision: str) -> ir.Model:
        """Give `typed`'s graph with one product of each that read the same rows; made once."""
        if precision not in self._merged_graphs:
            self._merged_graphs[precision] = self.cast(precision).clone()
            merge_matmuls(self._merged_graphs[precision].graph)
        return self._merged_graphs[precision]

    def cast(self, precision: str) -> ir.Model:
        """Give the graph in a precision of DTYPES, otherwise as traced; made once."""
        if precision not in self._cast_graphs:
            self._cast_graphs[precision] = self._graph.clone()
            cast_precision(self._cast_graphs[precision], DTYPES[precision])
        return self._cast_graphs[precision]
