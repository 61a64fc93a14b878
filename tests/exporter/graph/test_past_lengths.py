"""Graphs in place whose input `past_rows` sets P, in 16 bits, against the traced graph in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_runtime import contract

from .conftest import Traced, load
from .test_in_place_kv import Arrays, garbage, random_tree, rows, run, step
from .test_row_summaries import check
from .test_variants import on_gpu

BOUND = 20  # P, however many rows of the past are real


@pytest.fixture(scope="module")
def session(traced: Traced) -> onnxruntime.InferenceSession:
    return load(on_gpu(traced).ort_cuda("fp16"), traced.path.with_name("bound.onnx"))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_prefill_in_chunks_and_a_tree(traced: Traced, session: onnxruntime.InferenceSession, seed: int) -> None:
    rng = np.random.default_rng(seed)
    buffers = {name: (buffer / 50).astype(np.float16) for name, buffer in garbage(traced).items()}
    exact = {name: buffer.astype(np.float32) for name, buffer in buffers.items()}
    ids = rng.integers(0, traced.facts.vocab_size, size=23).tolist()
    steps = [step(traced, ids[first:last], first) for first, last in ((0, 9), (9, 13), (13, 14))]
    steps.append(step(traced, ids[14:], 14, random_tree(rng, 9)))
    for inputs in steps:
        compare(traced, session, inputs, buffers, exact)


def compare(
    traced: Traced, session: onnxruntime.InferenceSession, inputs: Arrays, buffers: Arrays, exact: Arrays
) -> None:
    """Run both graphs, each with its own past; garbage behind the real rows must not change anything."""
    length, T = int(inputs["past_length"][0]), inputs["input_ids"].shape[1]
    before = {name: buffer.copy() for name, buffer in buffers.items()}
    summarised = np.arange(T, dtype=np.int32)[None, ::-1].copy() if T > 1 else np.zeros((1, 0), np.int32)
    numbers = {contract.PAST_ROWS: np.arange(BOUND, dtype=np.int32), contract.SUMMARY_ROWS: summarised}
    found = run(session, inputs | numbers, buffers)
    expected = traced.run(**inputs, **{name: rows(buffer, 0, length).copy() for name, buffer in exact.items()})
    logits = found[contract.LOGITS]
    check([found[name] for name in contract.SUMMARY_OUTPUTS], logits[:, summarised[0]], logits)
    np.testing.assert_array_equal(found[contract.TOKENS], expected[contract.TOKENS])
    near = 0.004 * max(1.0, float(np.abs(expected[contract.LOGITS]).max()))
    for name in (contract.LOGITS, contract.HIDDEN):
        np.testing.assert_allclose(found[name], expected[name], atol=near, err_msg=name)
    for name, buffer in buffers.items():
        new = expected[name.replace("past", "new")]
        np.testing.assert_allclose(rows(buffer, length, length + T).astype(np.float32), new, atol=near)
        np.testing.assert_array_equal(buffer[:, :, :length], before[name][:, :, :length])
        np.testing.assert_array_equal(buffer[:, :, length + T :], before[name][:, :, length + T :])
        heads = new.reshape(T, traced.facts.kv_heads, traced.facts.head_dim).transpose(1, 0, 2)
        exact[name][0, :, length : length + T] = heads


def test_inputs_and_outputs_match_the_contract(traced: Traced, session: onnxruntime.InferenceSession) -> None:
    facts = traced.facts
    sizes = facts.layers, traced.heads.input_size, facts.vocab_size, facts.kv_heads, facts.head_dim
    specs = contract.in_place_specs(*sizes, "float16", gpu=True)
    for values, those in zip((session.get_inputs(), session.get_outputs()), specs, strict=True):
        assert [(value.name, tuple(value.shape)) for value in values] == [(spec.name, spec.shape) for spec in those]


def test_in_bf16_it_is_a_valid_graph_without_a_copy_of_the_past(traced: Traced, tmp_path: Path) -> None:
    graph = on_gpu(traced).ort_cuda("bf16")
    ir.save(graph, tmp_path / "bound.onnx")
    onnx.checker.check_model(str(tmp_path / "bound.onnx"), full_check=True)
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("GroupQueryAttention") == traced.facts.layers
    assert not {"Attention", "Softmax"} & set(kinds)
    users = {node.op_type for value in graph.graph.inputs if "past_key" in value.name for node in value.consumers()}
    assert users == {"GroupQueryAttention"}
