"""Rotary embeddings of every supported type: tables and graphs equal transformers, attention factor included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from medusa_exporter.graph.fuse import fuse
from medusa_exporter.graph.in_place_kv import write_kv_in_place
from medusa_exporter.graph.rotary_scaling import apply_attention_factor, without_attention_factor
from medusa_exporter.graph.rotary_tables import rotary_tables, spare_positions
from medusa_exporter.graph.trace import trace
from medusa_exporter.graph.variants import GpuVariants, TracedGraph
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.loading.rope import fix_longrope
from medusa_runtime import contract

from .conftest import CONTEXT, FAMILIES, LLAMA3_ROPE, TOP_K, YARN_ROPE, facts_of, load, make_model

ORIGINAL = 32  # positions before the rotary embedding was scaled
PAIRS = np.arange(8)
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {**LLAMA3_ROPE, "original_max_position_embeddings": ORIGINAL},
    "yarn": YARN_ROPE,
    "yarn-mscale": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-attention": {**YARN_ROPE, "attention_factor": 1.7, "beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": (1 + PAIRS / 10).tolist(),
        "long_factor": (1.0 + PAIRS).tolist(),
        "original_max_position_embeddings": ORIGINAL,
    },
}


def made(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, int]:
    """Return a model as a build prepares it, the same as transformers runs it, and the length that both support."""
    monkeypatch.setitem(FAMILIES, "llama-rope", {"rope_parameters": copy.deepcopy(ROPES[kind])})
    model = make_model("llama-rope")
    reference = copy.deepcopy(model)
    fix_longrope(model)
    return model, reference, ORIGINAL if kind == "longrope" else CONTEXT


def looked_at(length: int) -> list[int]:
    return [one for one in (0, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, length - 1) if one < length]


@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_those_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, length = made(kind, monkeypatch)
    tables = rotary_tables(model, length + 1)
    assert [table.shape for table in tables] == [(length + 1, 8)] * 2
    for position in looked_at(length):
        expected = reference.base_model.rotary_emb(torch.zeros(1), torch.tensor([[position]]))
        for table, one in zip(tables, expected, strict=True):
            np.testing.assert_array_equal(np.tile(table[position], 2), one[0, 0].numpy())


@pytest.mark.parametrize("kind", ["linear", "yarn-attention", "longrope"])
def test_graphs_equal_transformers(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, reference, length = made(kind, monkeypatch)
    facts = facts_of(model)
    heads = MedusaHeads(facts.hidden_size, 3, 1, "none")
    graph = trace(model, heads, facts, TOP_K)
    tables = rotary_tables(model, length + spare_positions(["ort-cpu"]))
    ids = np.random.default_rng(0).integers(0, facts.vocab_size, (1, length)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids).long()).logits[0, looked_at(length)].numpy()
    on_cpu = graph.clone()
    write_kv_in_place(on_cpu, facts, heads.input_size, tables)
    fuse(on_cpu)
    attention = [node for node in on_cpu.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes["do_rotary"].as_int() for node in attention] == [1] * facts.layers
    decomposed = GpuVariants(TracedGraph(graph, facts, heads.input_size, heads.heads, tables)).ort_cuda("fp32")
    for variant, shape in (
        (graph, (1, 0, facts.kv_row)),
        (decomposed, (1, 0, facts.kv_row)),
        (on_cpu, (1, facts.kv_heads, length + contract.SPARE_ROWS, facts.head_dim)),
    ):
        np.testing.assert_allclose(_logits(variant, ids, shape, looked_at(length), tmp_path), expected, atol=1e-5)


def _logits(graph: ir.Model, ids: np.ndarray, past: tuple[int, ...], rows: list[int], folder: Path) -> np.ndarray:
    session = load(graph, folder / "step.onnx")
    T = ids.shape[1]
    given = {
        contract.INPUT_IDS: ids,
        contract.POSITION_IDS: np.arange(T, dtype=np.int32)[None],
        contract.TREE_MASK: np.tri(T, dtype=bool)[None],
        contract.PAST_LENGTH: np.zeros(1, np.int32),
        contract.DRAFT_HIDDEN: np.zeros((0, 64), np.float32),
        contract.LOGIT_ROWS: np.array([rows], np.int32),
        contract.SUMMARY_ROWS: np.zeros((1, 0), np.int32),
    }
    inputs = {one.name: given.get(one.name, np.zeros(past, np.float32)) for one in session.get_inputs()}
    [logits] = session.run([contract.LOGITS], inputs)
    return logits[0]


def test_the_factor_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = made("yarn-attention", monkeypatch)
    with pytest.raises(ZeroDivisionError), without_attention_factor(model) as factor:
        assert (factor, model.base_model.rotary_emb.attention_scaling) == (1.7, 1.0)
        raise ZeroDivisionError
    assert model.base_model.rotary_emb.attention_scaling == 1.7


def test_a_factor_without_cosines_and_sines_is_refused() -> None:
    graph = ir.Graph([], [], nodes=[])
    apply_attention_factor(graph, 1.0)
    with pytest.raises(RuntimeError, match="no cosines and sines"):
        apply_attention_factor(graph, 1.5)
