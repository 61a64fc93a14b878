"""The CPU's graph against the traced one: prefill, trees and drafts agree, and rows are written in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from medusa_exporter.graph.grouped_queries import KEY_MULTIPLE
from medusa_profiles.profile import TreeProfile
from medusa_runtime import contract

from .conftest import HEADS, TOP_K, Traced, load
from .test_parity import TOLERANCE, random_tree

CAPACITY = 40
Arrays = dict[str, np.ndarray]


def step(traced: Traced, ids: list[int], length: int, tree: TreeProfile | None = None) -> Arrays:
    """A chunk of literal tokens, or a tree of them, behind `length` rows."""
    T = len(ids)
    depths = np.arange(T) if tree is None else tree.depths
    return {
        "input_ids": np.array([ids], np.int32),
        "position_ids": (length + depths)[None].astype(np.int32),
        "tree_mask": (np.tri(T, dtype=bool) if tree is None else tree.mask)[None],
        "past_length": np.array([length], np.int32),
        "draft_hidden": np.zeros((0, traced.heads.input_size), np.float32),
        "logit_rows": np.arange(T, dtype=np.int32)[None],
    }


def garbage(traced: Traced) -> Arrays:
    """Buffers full of finite garbage."""
    facts, rng = traced.facts, np.random.default_rng(5)
    names = [name(i) for name in (contract.past_key, contract.past_value) for i in range(facts.layers)]
    shape = (1, facts.kv_heads, CAPACITY, facts.head_dim)
    return {name: rng.normal(size=shape, scale=50).astype(np.float32) for name in names}


def run(session: object, inputs: Arrays, buffers: Arrays) -> Arrays:
    """Run with the buffers bound as inputs and outputs at once."""
    io = session.io_binding()  # type: ignore[attr-defined]
    names = [output.name for output in session.get_outputs()]  # type: ignore[attr-defined]
    given = inputs | buffers
    for name in [one.name for one in session.get_inputs()]:  # type: ignore[attr-defined]
        array = given[name]
        io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name in names:
        if (buffer := buffers.get(name.replace("present", "past"))) is None:
            io.bind_output(name)
        else:
            io.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
    session.run_with_iobinding(io)  # type: ignore[attr-defined]
    return {name: output.numpy() for name, output in zip(names, io.get_outputs(), strict=True)}


def rows(buffer: np.ndarray, first: int, last: int) -> np.ndarray:
    """(1, heads, C, D) -> (1, rows, heads * D), as the traced graph returns them."""
    part = buffer[:, :, first:last].transpose(0, 2, 1, 3)
    return part.reshape(1, last - first, part.shape[2] * part.shape[3])


def as_rows(buffers: Arrays, length: int) -> Arrays:
    return {name: rows(buffer, 0, length).copy() for name, buffer in buffers.items()}


def compare(traced: Traced, inputs: Arrays, buffers: Arrays) -> Arrays:
    """Run both graphs; check that results agree and that only the new rows of the buffers have changed."""
    length, T = int(inputs["past_length"][0]), inputs["input_ids"].shape[1]
    before = {name: buffer.copy() for name, buffer in buffers.items()}
    expected = traced.run(**inputs, **as_rows(buffers, length))
    found = run(traced.cpu, inputs, buffers)
    for name in (contract.TOKENS, contract.ARGMAX):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in (contract.LOGITS, contract.HIDDEN):
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE)
    for name, buffer in buffers.items():
        new = expected[name.replace("past", "new")]
        np.testing.assert_allclose(rows(buffer, length, length + T), new, atol=TOLERANCE)
        np.testing.assert_array_equal(buffer[:, :, :length], before[name][:, :, :length])
        last = -(-(length + T) // KEY_MULTIPLE) * KEY_MULTIPLE
        np.testing.assert_array_equal(buffer[:, :, last:], before[name][:, :, last:])
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_a_prefill_in_chunks_and_a_tree(traced: Traced, seed: int) -> None:
    rng, buffers = np.random.default_rng(seed), garbage(traced)
    ids = rng.integers(0, traced.facts.vocab_size, size=23).tolist()
    for first, last in ((0, 9), (9, 13), (13, 14)):
        compare(traced, step(traced, ids[first:last], first), buffers)
    tree = random_tree(rng, 9)
    compare(traced, step(traced, ids[14:], 14, tree), buffers)


def test_a_draft(traced: Traced) -> None:
    rng, buffers = np.random.default_rng(3), garbage(traced)
    ids = rng.integers(0, traced.facts.vocab_size, size=6).tolist()
    done = compare(traced, step(traced, ids, 0), buffers)
    tree = TreeProfile("all", tuple((0,) * depth + (rank,) for depth in range(HEADS) for rank in range(TOP_K)))
    inputs = step(traced, [0] * tree.size, 6, tree)
    inputs["input_ids"] = tree.candidate_ids(TOP_K)[None]
    inputs["input_ids"][0, 0] = done["argmax"][0, -1]
    inputs["draft_hidden"] = done["hidden"][0, -1:]
    assert (compare(traced, inputs, buffers)["tokens"] >= 0).all()


def test_a_single_row_has_the_same_bits_as_among_others(traced: Traced) -> None:
    """Not so without grouped queries: ONNX Runtime's matrix multiplication of one row sums in another order."""
    ungrouped = load(traced.cpu_graph, traced.path.with_name("ungrouped.onnx"))
    ids = np.random.default_rng(4).integers(0, traced.facts.vocab_size, size=25).tolist()
    last = contract.past_value(traced.facts.layers - 1)  # depends on all attention below
    same = []
    for session in (traced.cpu, ungrouped):
        before = garbage(traced)
        run(session, step(traced, ids[:20], 0), before)
        among, alone = ({name: buffer.copy() for name, buffer in before.items()} for _ in range(2))
        run(session, step(traced, ids[20:], 20), among)
        run(session, step(traced, ids[20:21], 20), alone)
        np.testing.assert_allclose(alone[last][:, :, 20], among[last][:, :, 20], atol=TOLERANCE)
        same.append(bool((alone[last][:, :, 20] == among[last][:, :, 20]).all()))
    assert same == [True, False]


def test_inputs_and_outputs_match_the_contract(traced: Traced) -> None:
    facts = traced.facts
    specs = contract.in_place_specs(
        facts.layers, traced.heads.input_size, facts.vocab_size, facts.kv_heads, facts.head_dim
    )
    for values, those in zip((traced.cpu.get_inputs(), traced.cpu.get_outputs()), specs, strict=True):
        assert [(value.name, tuple(value.shape)) for value in values] == [(spec.name, spec.shape) for spec in those]


def test_the_graph_has_few_fused_operators(traced: Traced) -> None:
    counts: dict[str, int] = {}
    for node in traced.cpu_graph.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    layers, trunk = traced.facts.layers, bool(traced.heads.trunk)
    qwen3 = traced.facts.family == "qwen3"  # it has norms of queries and keys, so these are split
    assert counts["GroupQueryAttention"] == layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers  # all norms but the first
    assert counts["RMSNormalization"] == (2 * layers if qwen3 else 0) + 1
    # queries, keys and values; output; gate and up; down; the layers of each head; the heads' shared block
    assert counts["MatMul"] == 4 * layers + traced.heads.layers + 2 * trunk
    assert counts["Split"] == (2 if qwen3 else 1) * layers + trunk  # gate from up
    assert counts["Transpose"] == 1  # the draft's candidates: (K, N, top_k) -> (N, K, top_k)
    assert counts["Concat"] <= 14 + bool(traced.heads.taps)
    assert counts["Reshape"] <= (4 * layers if qwen3 else 0) + 16  # qwen3 splits heads for their norms
    assert counts.get("RotaryEmbedding", 0) == (2 * layers if qwen3 else 0)  # its heads of 24 cannot be fused
    assert not counts.keys() & {
        "ReduceMean",
        "Softmax",
        "Attention",
        "Cos",
        "Sin",
    }  # angles are in tables


def test_attention_without_a_concat_of_rows_is_refused(traced: Traced) -> None:
    from medusa_exporter.graph.in_place_kv import write_kv_in_place

    with pytest.raises(RuntimeError, match="expected a Concat of past and new rows"):
        graph = ir.load(traced.path)
        for node in list(graph.graph):
            if node.op_type == "Concat" and any(value and value.name == "past_key_0" for value in node.inputs):
                ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[1])
        write_kv_in_place(graph, traced.facts, traced.heads.input_size, (np.zeros((1, 1), np.float32),) * 2)
