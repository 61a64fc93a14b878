"""The embedding and the lm_head in 8 bits: one table where they are one, and rows exactly as they were quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.graph.nbits_weight import quantise_blocks
from medusa_exporter.graph.quantise import quantised_tables, with_precision
from medusa_exporter.graph.save import save_graphs
from medusa_exporter.graph.vocabulary import SAME_TABLE, embedding_lookups, lm_head, tie_similar
from medusa_exporter.precisions import VOCABULARY

from .conftest import Traced
from .test_variants import source

V, WIDTH, IDS = 96, 128, np.array([[5, 0, 95, 5]], np.int32)


def graph(embedding: np.ndarray, head: np.ndarray | None) -> ir.Model:
    """`tokens` are the input; `rows` their embedding, and `logits` all rows by a head (None: by the embedding)."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["B", "T"]))
    tables = [
        ir.Value(name=name, const_value=ir.tensor(one, name=name), shape=ir.Shape(one.shape))
        for name, one in (("embedding", embedding), ("head", head))
        if one is not None
    ]
    width = ir.Value(name="width", const_value=ir.tensor(np.array([-1, embedding.shape[1]]), name="width"))
    tokens = ir.node("Identity", [ids])
    rows = ir.node("Gather", [tables[0], tokens.outputs[0]])
    flat = ir.node("Reshape", [rows.outputs[0], width])
    logits = ir.node("Gemm", [flat.outputs[0], tables[-1]], attributes={"transB": 1})
    nodes = [tokens, rows, flat, logits]
    for node, name in zip(nodes, ("tokens", "rows", "flat", "logits"), strict=True):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.INT32 if name == "tokens" else ir.DataType.FLOAT)
    tokens.outputs[0].shape = ids.shape
    outputs = [node.outputs[0] for node in nodes if node is not flat]
    made = ir.Graph([ids], outputs, nodes=nodes, initializers=[*tables, width], opset_imports={"": 23}, name="g")
    return ir.Model(made, ir_version=10)


def in_precisions(model: ir.Model, *precisions: str) -> dict[str, ir.Model]:
    tables = quantised_tables(model.graph)
    return {precision: with_precision(model, precision, {}, tables) for precision in precisions}


def run(model: ir.Model, ids: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["rows", "logits"], {"ids": ids})


def dequantised(table: np.ndarray) -> np.ndarray:
    packed, scales = quantise_blocks(np.ascontiguousarray(table.T), VOCABULARY)
    rows = (packed.astype(np.float32) - 128) * scales[:, :, None]
    return rows.reshape(len(table), -1)[:, : table.shape[1]]


def table(width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((V, width)).astype(np.float32)


def rounded(values: np.ndarray, share: float) -> np.ndarray:
    """Return rows that differ from `values` by a share of their norm."""
    noise = table(values.shape[1], seed=9)
    sizes = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (values, noise)]
    return values + (noise * share * sizes[0] / sizes[1]).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [WIDTH, 100, 24])  # blocks of 64: whole, padded, fewer than one
def test_rows_are_exactly_the_quantised_ones(width: int, tied: bool, precision: str) -> None:
    embedding, head = table(width), None if tied else table(width, seed=1)
    rows, logits = run(in_precisions(graph(embedding, head), precision)[precision], IDS)
    np.testing.assert_array_equal(rows, dequantised(embedding)[IDS])
    expected = rows[0] @ dequantised(embedding if head is None else head).T
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()  # the rows are rounded to 8 bits once more


def test_a_row_is_the_same_among_others() -> None:
    model = in_precisions(graph(table(), None), "int4")["int4"]
    for several, one in zip(run(model, IDS), run(model, IDS[:, 2:3]), strict=True):
        np.testing.assert_array_equal(several.reshape(IDS.size, -1)[2], one.reshape(1, -1)[0])


def test_a_tied_table_is_stored_once_for_all_precisions(tmp_path: Path) -> None:
    made = in_precisions(graph(table(), None), "int8", "int4")
    for one in made.values():
        assert set(one.graph.initializers) >= {"embedding.q8", "embedding.q8_scales"}
        assert "embedding" not in one.graph.initializers
    save_graphs({tmp_path / f"{name}.onnx": one for name, one in made.items()}, "shared.data")
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir() if file.suffix == ".data"}
    assert files.keys() == {"shared.data"}
    assert V * WIDTH <= files["shared.data"] < V * WIDTH * 1.5


def test_separate_tables_are_separate() -> None:
    made = in_precisions(graph(table(), table(seed=1)), "int4")["int4"]
    assert {"embedding.q8", "head.q8"} <= set(made.graph.initializers)


@pytest.mark.parametrize(("share", "same"), [(0.5 * SAME_TABLE, True), (1.5 * SAME_TABLE, False)])
def test_one_table_rounded_twice_is_one_in_int4_only(share: float, same: bool) -> None:
    made = in_precisions(graph(rounded(table(), share), table()), "int8", "int4")
    assert {"embedding.q8", "head.q8"} <= set(made["int8"].graph.initializers)
    assert ("embedding.q8" not in made["int4"].graph.initializers) == same


def test_tables_with_one_other_row_are_not_the_same() -> None:
    other = table()
    other[V - 1] *= -1
    model = graph(other, table())
    tie_similar(model.graph)
    assert embedding_lookups(model.graph)[0].inputs[0] is model.graph.initializers["embedding"]


def test_a_quantised_graph_has_no_more_tables() -> None:
    made = in_precisions(graph(table(), None), "int8")["int8"]
    assert lm_head(made.graph) is None
    assert embedding_lookups(made.graph) == []


def test_no_family_keeps_a_table_in_fp32(traced: Traced) -> None:
    from medusa_exporter.graph.variants import ort_cpu_graphs

    [made] = ort_cpu_graphs(source(traced), ["int4"]).values()
    vocabulary = traced.model.config.vocab_size
    floats = [one for one in made.graph.initializers.values() if one.dtype == ir.DataType.FLOAT]
    assert not [one.name for one in floats if one.const_value.size >= vocabulary * traced.facts.hidden_size]
    bits = {node.attributes["bits"].as_int() for node in made.graph if node.op_type == "MatMulNBits"}
    assert bits == {4, 8}
