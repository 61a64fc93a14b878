"""Logits of a single sequence, with and without a bias, against the graph before the rewrite."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from medusa_exporter.graph.edit import constant
from medusa_exporter.graph.in_place_kv import write_kv_in_place
from medusa_exporter.graph.logits import single_sequence_logits
from medusa_exporter.graph.rotary_tables import rotary_tables
from medusa_runtime import contract

from .conftest import CONTEXT, Traced, load
from .test_in_place_kv import garbage, random_tree, run, step


def logits_of(graph: ir.Model) -> ir.Value:
    [found] = [value for value in graph.graph.outputs if value.name == contract.LOGITS]
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_the_same_without_a_copy(traced: Traced, bias: bool) -> None:
    before = ir.load(traced.path)
    if bias:
        product = logits_of(before).producer().inputs[0].producer()
        numbers = np.linspace(-1, 1, traced.facts.vocab_size, dtype=np.float32)
        product.resize_inputs(3)
        product.replace_input_with(2, constant(before.graph, "bias", numbers))
    write_kv_in_place(before, traced.facts, traced.heads.input_size, rotary_tables(traced.model, CONTEXT))
    after = before.clone()
    single_sequence_logits(after)
    assert len(after.graph) < len(before.graph) - 3
    assert logits_of(after).producer().op_type == ("Add" if bias else "FusedMatMul")
    rng = np.random.default_rng(4)
    inputs = step(traced, rng.integers(0, traced.facts.vocab_size, size=9).tolist(), 14, random_tree(rng, 9))
    inputs["logit_rows"] = np.array([[8, 0, 3]], np.int32)
    buffers = [garbage(traced) for _ in range(2)]  # kept alive: the graph writes to them
    expected, got = (
        run(load(graph, traced.path.with_name(f"logits-{number}.onnx")), inputs, buffers[number])
        for number, graph in enumerate((before, after))
    )
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape
        np.testing.assert_allclose(got[name], array, atol=1e-5, err_msg=name)


def test_another_end_of_the_graph_is_refused(traced: Traced) -> None:
    graph = ir.load(traced.path)
    write_kv_in_place(graph, traced.facts, traced.heads.input_size, rotary_tables(traced.model, CONTEXT))
    single_sequence_logits(graph)
    with pytest.raises(RuntimeError, match="expected a Reshape on the way to the logits"):
        single_sequence_logits(graph)
