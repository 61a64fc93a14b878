"""Grouped queries against one GroupQueryAttention, bit by bit; other tests of the CPU's graph run grouped ones too."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from medusa_exporter.graph import grouped_queries, query_rows
from medusa_exporter.graph.grouped_queries import group_queries
from medusa_exporter.graph.query_rows import parts_of
from medusa_runtime import contract

from .conftest import Traced, load
from .test_in_place_kv import garbage, run, step
from .test_parity import TOLERANCE, random_tree


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts"),
    [(9, 3, 2), (14, 2, 2), (32, 8, 1), (8, 1, 4), (4, 2, 2), (4, 4, 1), (64, 8, 1), (2, 1, 2), (12, 1, 4)],
)
def test_key_heads_are_divided_until_threads_have_enough(heads: int, kv_heads: int, parts: int) -> None:
    assert parts_of(heads, kv_heads) == parts


@pytest.fixture
def one_by_one(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> onnxruntime.InferenceSession:
    """The same graph in which every query head is a part of its own."""
    monkeypatch.setattr(query_rows, "parts_of", lambda heads, kv_heads: heads // kv_heads)
    graph = traced.cpu_graph.clone()
    group_queries(graph)
    return load(graph, traced.path.with_name("one-by-one.onnx"))


def test_results_equal_those_of_heads_one_by_one(traced: Traced, one_by_one: onnxruntime.InferenceSession) -> None:
    """Bit by bit, also where there are fewer keys than query rows."""
    rng = np.random.default_rng(8)
    ids = rng.integers(0, traced.facts.vocab_size, size=30).tolist()
    for length in (0, 1, 2, 5, 20):
        for rows in (1, 2, 3, 7, 10):
            tree = random_tree(rng, rows) if length == 20 else None
            found = []
            for session in (traced.cpu, one_by_one):
                buffers = garbage(traced)
                if length:
                    run(one_by_one, step(traced, ids[:length], 0), buffers)
                done = run(session, step(traced, ids[length : length + rows], length, tree), buffers)
                found.append((done, buffers))
            for name in (contract.LOGITS, contract.HIDDEN):
                np.testing.assert_array_equal(found[0][0][name], found[1][0][name], err_msg=f"{length} {rows} {name}")
            for name, buffer in found[0][1].items():
                np.testing.assert_array_equal(buffer, found[1][1][name], err_msg=f"{length} {rows} {name}")


def test_a_row_has_the_same_bits_whatever_follows_it(traced: Traced) -> None:
    """Numbers of keys that are no multiple of 4 would change the last bits on processors with vectors of 4 floats."""
    ids = np.random.default_rng(9).integers(0, traced.facts.vocab_size, size=30).tolist()
    for length in (3, 6, 17):
        found = []
        for rows in (1, 2, 3, 5, 9):
            buffers = garbage(traced)
            run(traced.cpu, step(traced, ids[:length], 0), buffers)
            done = run(traced.cpu, step(traced, ids[length : length + rows], length), buffers)
            found.append(done["hidden"][0, 0])
        for hidden in found[1:]:
            np.testing.assert_array_equal(hidden, found[0])


def test_all_attention_has_a_multiple_of_4_keys(traced: Traced) -> None:
    graph = traced.cpu_graph.clone()
    group_queries(graph)
    buffers = garbage(traced)
    before = {name: buffer.copy() for name, buffer in buffers.items()}
    run(load(graph, traced.path.with_name("grouped.onnx")), step(traced, [3, 5], 7), buffers)
    for name, buffer in buffers.items():  # 7 + 2 keys become 12: three copies of the last
        changed = (buffer != before[name]).any(axis=(0, 1, 3)).nonzero()[0]
        assert changed.tolist() == [7, 8, 9, 10, 11]
        for copy in (9, 10, 11):
            np.testing.assert_array_equal(buffer[:, :, copy], buffer[:, :, 8])


def test_chunks_of_prompts_use_flash_attention(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to the traced graph as grouped rows; masks that are not causal, of trees and windows, stay masks."""
    for module in (grouped_queries, query_rows):
        monkeypatch.setattr(module, "MAX_GROUPED_NODES", 2)
    graph = traced.cpu_graph.clone()
    group_queries(graph)
    session = load(graph, traced.path.with_name("chunks.onnx"))
    rng = np.random.default_rng(10)
    ids = rng.integers(0, traced.facts.vocab_size, size=30).tolist()
    for length, tree in ((0, None), (1, None), (14, None), (14, random_tree(rng, 9))):
        given = step(traced, ids[length : length + 9], length, tree)
        found = []
        for one in (session, traced.cpu):
            buffers = garbage(traced)
            if length:
                run(traced.cpu, step(traced, ids[:length], 0), buffers)
            found.append(run(one, given, buffers)[contract.LOGITS])
        np.testing.assert_allclose(found[0], found[1], atol=TOLERANCE)
        windowed = "window" in str(traced.path) or getattr(traced.model.config, "sliding_window", None)
        if tree is not None:
            np.testing.assert_array_equal(found[0], found[1])  # the same operator with the same mask
        elif length == 14 and not windowed:
            assert (found[0] != found[1]).any()  # flash attention adds up in another order


def test_each_layer_writes_keys_and_values(traced: Traced) -> None:
    graph = traced.cpu_graph.clone()
    group_queries(graph)
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("TensorScatter") == 2 * traced.facts.layers
    assert kinds.count("If") - traced.facts.layers in (1, 2) and "GroupQueryAttention" not in kinds
