"""Integer matrix multiplications on tiny models: close to floats, and each row independent of the others."""

from __future__ import annotations

import numpy as np
import pytest
from medusa_exporter.graph.calibration import bounded_matmuls, measure_ranges
from medusa_exporter.graph.integer_matmul import use_integer_matmuls
from medusa_runtime import contract

from .conftest import Traced, load
from .test_in_place_kv import garbage, run, step


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(6)
    return [rng.integers(0, 251, size=30).tolist() for _ in range(8)]


def test_ranges_are_the_largest_magnitudes_of_each_channel(traced: Traced, texts: list[list[int]]) -> None:
    size = traced.heads.input_size
    products = bounded_matmuls(traced.cpu_graph.graph)
    # queries, keys and values; output; gate and up
    assert len(products) == 3 * traced.facts.layers
    whole = measure_ranges(traced.cpu_graph, traced.facts, size, texts)
    assert set(whole) == {str(node.inputs[0].name) for node in products if node.inputs[0] is not None}
    parts = [measure_ranges(traced.cpu_graph, traced.facts, size, [text]) for text in texts]
    for name, found in whole.items():
        np.testing.assert_array_equal(found, np.max([part[name] for part in parts], axis=0))
        assert found.shape == (64 if found.size == 64 else traced.facts.attention_heads * traced.facts.head_dim,)
        assert (found > 0).all()


def test_integers_are_close_to_floats(traced: Traced, texts: list[list[int]]) -> None:
    graph = traced.cpu_graph.clone()
    use_integer_matmuls(graph, measure_ranges(graph, traced.facts, traced.heads.input_size, texts))
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("QuantizeLinear") == 3 * traced.facts.layers
    session = load(graph, traced.path.with_name("integers.onnx"))
    ids = texts[0][:20]
    expected = run(traced.cpu, step(traced, ids, 0), garbage(traced))["logits"][0]
    found = run(session, step(traced, ids, 0), garbage(traced))["logits"][0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.7


def test_rows_are_independent(traced: Traced, texts: list[list[int]]) -> None:
    graph = traced.cpu_graph.clone()
    use_integer_matmuls(graph, measure_ranges(graph, traced.facts, traced.heads.input_size, texts))
    session = load(graph, traced.path.with_name("integers.onnx"))
    found = []
    for beside in ([3, 4], [200, 250], [9, 9, 9, 9]):
        buffers = garbage(traced)
        run(session, step(traced, texts[1][:10], 0), buffers)
        done = run(session, step(traced, [7, *beside], 10), buffers)
        found.append((done["logits"][0, 0], buffers[contract.past_key(1)][0, :, 10].copy()))
    for logits, keys in found[1:]:
        np.testing.assert_array_equal(keys, found[0][1])
        np.testing.assert_allclose(logits, found[0][0], atol=1e-5)
