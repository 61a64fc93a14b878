"""The heads as a branch: the same results, with and without a draft, and fewer operators without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.logits import single_sequence_rows
from medusa_exporter.graph.skip_draft import skip_empty_draft
from medusa_exporter.graph.topk import two_stage_argmax
from medusa_runtime import contract

from .conftest import TOP_K, Traced, load
from .test_in_place_kv import garbage, run, step


@pytest.fixture
def rewritten(traced: Traced) -> ir.Model:
    graph = traced.cpu_graph.clone()
    single_sequence_rows(graph)
    two_stage_argmax(graph.graph)
    skip_empty_draft(graph)
    return graph


@pytest.fixture
def session(traced: Traced, rewritten: ir.Model) -> onnxruntime.InferenceSession:
    return load(rewritten, traced.path.with_name("skipped.onnx"))


def test_results_stay_the_same(traced: Traced, session: onnxruntime.InferenceSession) -> None:
    before = load(traced.cpu_graph, traced.path.with_name("before.onnx"))
    rng = np.random.default_rng(3)
    ids = rng.integers(0, traced.facts.vocab_size, size=12).tolist()
    hidden = rng.standard_normal((1, traced.heads.input_size)).astype(np.float32)
    cases = [(ids, 0, None), ([ids[0], -1, -1 - TOP_K], 12, hidden), ([ids[1], -2], 12, hidden), (ids[:1], 12, None)]
    for given, length, drafted in cases:
        feeds = step(traced, given, length)
        feeds[contract.DRAFT_HIDDEN] = np.zeros_like(hidden[:0]) if drafted is None else drafted
        found = []
        for one in (before, session):
            buffers = garbage(traced)
            if length:
                run(before, step(traced, ids, 0), buffers)
            found.append(run(one, feeds, buffers))
        for name in (contract.TOKENS, contract.ARGMAX, contract.LOGITS, contract.HIDDEN):
            np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)


def test_the_heads_are_in_a_branch(traced: Traced, rewritten: ir.Model) -> None:
    [choice] = [node for node in rewritten.graph if node.op_type == "If"]
    inside = [node.op_type for node in choice.attributes["then_branch"].as_graph()]
    assert "TopK" in inside and "TopK" not in [node.op_type for node in rewritten.graph]
    assert [node.op_type for node in choice.attributes["else_branch"].as_graph()] == ["Identity"]
    assert len(inside) > 30


def test_a_draft_that_others_read_stays(traced: Traced) -> None:
    graph = traced.cpu_graph.clone()
    [top] = [node for node in graph.graph if node.op_type == "TopK"]
    graph.graph.outputs.append(top.outputs[1])
    skip_empty_draft(graph)
    assert "If" not in [node.op_type for node in graph.graph]
