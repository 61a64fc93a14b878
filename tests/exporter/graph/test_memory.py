"""No weight stays in memory after a build has finished with its graphs."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import onnx_ir as ir
import pytest
import torch
from medusa_exporter.graph import memory, variants
from medusa_exporter.graph import trace as tracing
from medusa_exporter.graph.lazy_weights import SelectedRows
from medusa_exporter.graph.nbits_weight import quantise_blocks
from medusa_exporter.graph.rotary_tables import rotary_tables, spare_positions
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.precisions import DRAFT, choose_pairs
from onnxscript import optimizer

from .conftest import CONTEXT, HEADS, TOP_K, facts_of, make_model


def traced_nodes() -> int:
    return sum(type(one) is torch.fx.Node for one in gc.get_objects())


def test_no_weight_outlives_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FOLD_LIMIT", 10_000)
    memory.release_memory()
    before = traced_nodes()
    model = make_model("llama3-rope")  # its embedding is tied to its lm_head
    facts = facts_of(model)
    heads = MedusaHeads(facts.hidden_size, HEADS, 1, "root", trunk=24, taps=(1,), token_map=torch.randperm(251))
    weights = {name: weakref.ref(weight) for module in (model, heads) for name, weight in module.named_parameters()}
    graph = tracing.trace(model, heads, facts, TOP_K)
    assert traced_nodes() <= before  # no nodes of the exported program, although the graph is alive
    rows = [one.const_value for one in graph.graph.initializers.values() if isinstance(one.const_value, SelectedRows)]
    draft = model.get_output_embeddings().weight[heads.token_map].detach().numpy()
    assert [np.array_equal(one.numpy(), draft) for one in rows] == [True]  # computed when they are read
    tables = rotary_tables(model, CONTEXT + spare_positions(["ort-cpu"]))
    source = variants.TracedGraph(graph, facts, heads.input_size, heads.heads, tables)
    made, _ = variants.make_graphs(source, choose_pairs(("ort-cpu",), ("fp32", "int4")), [])
    packed, _ = quantise_blocks(draft.T, DRAFT)
    monkeypatch.setattr(SelectedRows, "numpy", lambda _rows: pytest.fail("all rows were copied at once"))
    held = [one.const_value for one in made["graphs/ort-cpu-fp32.onnx"].graph.initializers.values()]
    held = [one for one in held if not isinstance(one, SelectedRows)]
    assert any(one.shape == packed.shape and np.array_equal(one.numpy(), packed) for one in held if one is not None)
    assert all(weight() is not None for weight in weights.values())
    del model, heads, graph, source, made, rows, held
    memory.release_memory()
    assert [name for name, weight in weights.items() if weight() is not None] == []


def test_rules_still_match_after_their_matchers_were_reset() -> None:
    memory.release_memory()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    zero = ir.Value(name="zero", const_value=ir.tensor(np.array(0, np.float32), name="zero"))
    sum_ = ir.node("Add", [x, zero])
    graph = ir.Graph([x], sum_.outputs, nodes=[sum_], initializers=[zero], opset_imports={"": 20}, name="sum")
    model = ir.Model(graph, ir_version=10)
    optimizer.optimize_ir(model)
    assert "Add" not in {node.op_type for node in model.graph}


def test_free_pages_are_returned_if_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        malloc_trim = asked.append

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Library())
    for platform, wanted in (("linux", [0]), ("darwin", []), ("win32", [])):
        asked.clear()
        monkeypatch.setattr(memory.sys, "platform", platform)
        memory.release_memory()
        assert asked == wanted, platform
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())  # a C library without malloc_trim, such as musl
    memory.release_memory()
