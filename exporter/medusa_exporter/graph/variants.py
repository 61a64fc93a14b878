"""Makes the graph variant of each backend: applies the rewrites that turn the traced graph into it.

The order of the rewrites per backend is in the documentation of the package, `medusa_exporter.graph`.
"""

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
from medusa_exporter.graph.decompose import decompose_all
from medusa_exporter.graph.decompose_attention import decompose_attention, softcap_of
from medusa_exporter.graph.freeze_shapes import freeze_shapes, run_all_heads
from medusa_exporter.graph.fuse import fuse
from medusa_exporter.graph.in_place_kv import write_kv_in_place
from medusa_exporter.graph.logits import single_sequence_logits, single_sequence_rows
from medusa_exporter.graph.merge_matmuls import merge_matmuls
from medusa_exporter.graph.quantise import quantise_draft, quantise_heads, quantised_tables, with_precision
from medusa_exporter.graph.rotary_tables import with_still_row
from medusa_exporter.graph.row_summaries import summarise_rows
from medusa_exporter.graph.skip_draft import skip_empty_draft
from medusa_exporter.graph.stack_layers import stack_layers
from medusa_exporter.graph.topk import two_stage_argmax, two_stage_topk
from medusa_exporter.precisions import DRAFT, FIXED_SCALES


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph and what its variants depend on.

    Attributes:
        graph: The graph, from `trace`.
        facts: The decoder's sizes.
        state_size: E, the size of a row of `hidden`.
        heads: The number of heads; 0 if the graph has none.
        tables: Cosines and sines of all positions, from `rotary_tables`.
        windowed: Whether some layers have a sliding window that is shorter than the context.
        texts: Token ids of texts to measure activations on; only precisions with fixed scales need them.
        scratch: A folder for a temporary copy of the weights; None for the system's temporary folder.
    """

    graph: ir.Model
    facts: ModelFacts
    state_size: int
    heads: int
    tables: tuple[NDArray[np.float32], NDArray[np.float32]]
    windowed: bool = False
    texts: Sequence[Sequence[int]] = ()
    scratch: Path | None = None


def make_graphs(
    traced: TracedGraph, pairs: Iterable[tuple[str, str]], steps: Iterable[StepSize], fused: Container[str] = ()
) -> tuple[dict[str, ir.Model], dict[str, StepSize]]:
    """Return all graphs of a bundle. They share the tensors that they have in common.

    Args:
        traced: The traced graph.
        pairs: Backends and precisions.
        steps: The step sizes that TensorRT gets a graph for.
        fused: Backends, of TensorRT's, whose graphs keep attention, norms and rotary embeddings as one operator each.

    Returns:
        The graph of each file of the bundle, and the step size of each file that has a fixed one.
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
    """Return the graph for ONNX Runtime on a CPU in each precision."""
    if not precisions:
        return {}
    graph = traced.graph.clone()
    write_kv_in_place(graph, traced.facts, traced.state_size, with_still_row(traced.tables))
    fuse(graph)
    two_stage_argmax(graph.graph)
    quantise_heads(graph, DRAFT)
    integers = graph.clone() if FIXED_SCALES.intersection(precisions) else graph  # the draft's lm_head in integers too
    quantise_draft(graph, DRAFT)
    model = traced.facts, traced.state_size
    ranges = measure_ranges(graph, *model, traced.texts, traced.scratch) if traced.texts else {}
    tables = quantised_tables(graph.graph)
    graphs = {
        precision: with_precision(integers if precision in FIXED_SCALES else graph, precision, ranges, tables)
        for precision in precisions
    }
    for made in graphs.values():
        single_sequence_rows(made)
        if traced.heads:
            skip_empty_draft(made)
    return graphs


class GpuVariants:
    """The graph variants of GPU backends. Graphs of one precision share its weights.

    All heads run: as traced, their number depends on the tree, so it would have to be copied to the host, and the step
    could not be captured as a CUDA graph.
    """

    def __init__(self, traced: TracedGraph) -> None:
        self._traced, self._graph = traced, traced.graph.clone()
        run_all_heads(self._graph, traced.heads)
        self._cast: dict[str, ir.Model] = {}  # by precision
        self._merged: dict[str, ir.Model] = {}
        cos, sin = traced.tables
        self._tables = ir.tensor(cos), ir.tensor(sin)  # the same tensors for all graphs

    def ort_cuda(self, precision: str) -> ir.Model:
        """Return the graph for ONNX Runtime on a GPU.

        In 16 bits, keys and values are written in place. The operator that does this does not support fp32; there,
        attention is decomposed, because ONNX Runtime's kernel of `Attention` is slow for several rows and a mask.
        """
        graph, traced = self.cast(precision).clone(), self._traced
        in_place = in_place_on_gpu(precision)
        summarise_rows(graph.graph, traced.facts.vocab_size, {"B": 1} if in_place else {})
        if in_place:
            write_kv_in_place(graph, traced.facts, traced.state_size, traced.tables, DTYPES[precision])
            single_sequence_logits(graph)
        else:
            decompose_attention(graph)
        fuse(graph)
        return graph

    def tensorrt(self, precision: str, size: StepSize, *, fused: bool = False) -> ir.Model:
        """Return the graph for TensorRT with one step size; only the length of the past, P, is symbolic.

        Args:
            precision: fp32, fp16 or bf16.
            size: The step size.
            fused: Whether attention, norms and rotary embeddings stay one operator each. If not, they are decomposed
                into operators that every version of TensorRT supports.
        """
        graph = freeze_shapes(self._with_merged_matmuls(precision), size.sizes)
        stack_layers(graph.graph, self._traced.facts.layers)
        two_stage_topk(graph.graph)
        summarise_rows(graph.graph, self._traced.facts.vocab_size, size.sizes, tensorrt=True)
        if fused:
            if any(softcap_of(node) for node in graph.graph):  # TensorRT's own attention does not support it
                decompose_attention(graph, size.nodes)
            cast_masks(graph.graph)
            strip_metadata(graph)
        else:
            decompose_all(graph, size.nodes, self._traced.facts.context, self._tables)
        return graph

    def cast(self, precision: str) -> ir.Model:
        """Return the traced graph in a precision of DTYPES; it is made once per precision."""
        if precision not in self._cast:
            self._cast[precision] = self._graph.clone()
            cast_precision(self._cast[precision], DTYPES[precision])
        return self._cast[precision]

    def _with_merged_matmuls(self, precision: str) -> ir.Model:
        if precision not in self._merged:
            self._merged[precision] = self.cast(precision).clone()
            merge_matmuls(self._merged[precision].graph)
        return self._merged[precision]
