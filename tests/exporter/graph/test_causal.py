"""The causal graph, in 16 bits, against the traced graph with a causal mask."""

from __future__ import annotations

import numpy as np
from medusa_exporter.engines.step_sizes import causal_file
from medusa_exporter.graph.causal import causal_graph
from medusa_exporter.graph.in_place_kv import MASK
from medusa_exporter.graph.variants import make_graphs
from medusa_runtime import contract

from .conftest import Traced, load
from .test_in_place_kv import garbage, step
from .test_past_lengths import compare
from .test_variants import on_gpu, source, windowed

FILE = causal_file("ort-cuda", "fp16")


def test_prompts_in_chunks_and_single_rows(traced: Traced) -> None:
    graphs, _ = make_graphs(source(traced), [("ort-cuda", "fp16"), ("ort-cuda", "fp32"), ("ort-cpu", "fp32")], [])
    assert causal_file("ort-cuda", "fp32") not in graphs
    if windowed(traced):  # sliding windows need a mask
        assert FILE not in graphs
        return
    rng = np.random.default_rng(0)
    buffers = {name: (buffer / 50).astype(np.float16) for name, buffer in garbage(traced).items()}
    exact = {name: buffer.astype(np.float32) for name, buffer in buffers.items()}
    session = load(graphs[FILE], traced.path.with_name("causal.onnx"))
    ids = rng.integers(0, traced.facts.vocab_size, size=23).tolist()
    for first, last in ((0, 9), (9, 13), (13, 14), (14, 15), (15, 23)):
        compare(traced, session, step(traced, ids[first:last], first), buffers, exact)


def test_it_matches_the_contract_and_shares_the_other_graphs_weights(traced: Traced) -> None:
    graph = on_gpu(traced).ort_cuda("bf16")
    found = causal_graph(graph)
    names = [value.name for value in graph.graph.inputs if value.name not in contract.CAUSAL_OMITTED_INPUTS]
    assert [value.name for value in found.graph.inputs] == names
    assert [value.name for value in found.graph.outputs] == [value.name for value in graph.graph.outputs]
    held = {id(value.const_value) for value in graph.graph.initializers.values()}
    assert {id(value.const_value) for value in found.graph.initializers.values()} < held
    attention = [node for node in found.graph if node.op_type == "GroupQueryAttention"]
    assert len(attention) == traced.facts.layers
    assert all(value is None for node in attention for value in node.inputs[MASK:])
