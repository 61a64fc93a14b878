"""Graphs for GPUs against the traced one: fixed sizes, decomposed operators, 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from medusa_exporter.engines.step_sizes import StepSize
from medusa_exporter.graph import variants
from medusa_exporter.graph.cast_precision import DTYPES, cast_precision
from medusa_exporter.graph.decompose import OPSET
from medusa_exporter.graph.rotary_tables import rotary_tables
from medusa_runtime import contract
from medusa_runtime.backends.kv_arena import kv_tensor_names
from medusa_runtime.errors import UnsupportedModelError

from .conftest import CONTEXT, HEADS, TOP_K, Traced
from .fp16_rounding import round_to_fp16
from .test_row_summaries import check

FUSED = {"Attention", "RMSNormalization", "RotaryEmbedding"}
T, P = 5, 16
TREE = np.array([[0, -1, -1 - TOP_K - 2, -2, -1 - 2 * TOP_K - 1]], np.int32)  # 0: replaced by the root
DEPTHS = np.array([0, 1, 2, 1, 2], np.int32)
MASK = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], np.bool_)


def source(traced: Traced, texts: Sequence[Sequence[int]] = ()) -> variants.TracedGraph:
    tables = rotary_tables(traced.model, CONTEXT)
    facts, size = traced.facts, traced.heads.input_size
    return variants.TracedGraph(ir.load(traced.path), facts, size, HEADS, tables, windowed(traced), texts)


def windowed(traced: Traced) -> bool:
    return getattr(traced.model.config, "sliding_window", None) is not None


def on_gpu(traced: Traced) -> variants.GpuVariants:
    return variants.GpuVariants(source(traced))


def inputs(traced: Traced, lengths: list[int], *, draft: bool) -> dict[str, np.ndarray]:
    rng, B = np.random.default_rng(len(lengths)), len(lengths)
    ids = np.repeat(TREE, B, axis=0) if draft else rng.integers(0, 250, (B, T)).astype(np.int32)
    ids[:, 0] = rng.integers(0, 250, B)
    past_length = np.array(lengths, np.int32)
    past = {name: rows / 50 for name, rows in traced.past(P, B, rng).items()}
    return {
        "input_ids": ids,
        "position_ids": past_length[:, None] + DEPTHS,
        "tree_mask": np.repeat(MASK[None], B, axis=0),
        "past_length": past_length,
        "draft_hidden": rng.normal(size=(B if draft else 0, traced.heads.input_size)).astype(np.float32),
        "logit_rows": np.repeat(np.arange(T, dtype=np.int32)[None], B, axis=0),
        **past,
    }


def run(graph: ir.Model, folder: Path, given: dict[str, np.ndarray], *, rounded: bool = False) -> dict[str, np.ndarray]:
    """Run a graph, with its rows summarised and compared with its logits, unless these are `rounded`.

    If it stacks the rows of all layers, stack its inputs and split its outputs.
    """
    path = folder / "variant.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    layers = sum(name.startswith("past_key_") for name in given)
    order = list(kv_tensor_names(layers, contract.new_key, contract.new_value))
    B = len(given["input_ids"])
    rows = np.random.default_rng(B).integers(0, T, (B, T)).astype(np.int32)
    given = given | {"past": np.concatenate([given[past] for past, _ in order], axis=-1), "summary_rows": rows}
    fed = {one.name: given[one.name].astype(types.get(one.type, given[one.name].dtype)) for one in session.get_inputs()}
    made = dict(zip((one.name for one in session.get_outputs()), session.run(None, fed), strict=True))
    if "new" in made:
        parts = np.split(made.pop("new"), len(order), axis=-1)
        made |= {new: part for (_, new), part in zip(order, parts, strict=True)}
    summaries = [made.pop(name) for name in contract.SUMMARY_OUTPUTS]
    if not rounded:
        check(summaries, np.take_along_axis(made["logits"], rows[..., None], axis=1), made["logits"])
    return made


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        if name in ("tokens", "argmax") and tolerance > 1e-3:
            continue  # two tokens with close logits may swap
        np.testing.assert_allclose(found[name].astype(np.float32), expected, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("lengths", [[7], [9, 0]], ids=str)
@pytest.mark.parametrize("draft", [False, True])
def test_decomposed_with_fixed_sizes(traced: Traced, tmp_path: Path, lengths: list[int], draft: bool) -> None:
    B = len(lengths)
    given = inputs(traced, lengths, draft=draft)
    graph = on_gpu(traced).tensorrt("fp32", StepSize(B, T, T, draft))
    assert not (FUSED | {"Range"}) & {node.op_type for node in graph.graph}
    joined = [node for node in graph.graph if node.op_type in ("Concat", "Expand")]
    assert ir.DataType.BOOL not in {node.outputs[0].dtype for node in joined}
    assert graph.opset_imports[""] == OPSET
    assert all(value.const_value is None for value in graph.graph.inputs)
    shaping = [node.op_type for node in graph.graph if node.op_type in ("Shape", "Range", "Expand")]
    assert shaping.count("Shape") <= 2  # of the past only, whose length stays symbolic
    assert ("draft_hidden" in {value.name for value in graph.graph.inputs}) is draft
    facts, kinds = traced.facts, [node.op_type for node in graph.graph]
    assert ("ArgMax" in kinds) is (facts.vocab_size % 2 == 1)  # otherwise it is TopK in two stages; 251 is prime
    attended = kinds.count("Softmax") * (4 if facts.kv_heads == facts.attention_heads else 2)
    linear = sum(node.inputs[1].const_value is not None for node in graph.graph if node.op_type == "MatMul")
    assert kinds.count("MatMul") - linear == attended  # separate past and new rows only if G = 1
    agree(run(graph, tmp_path, given), traced.run(**given), 1e-4)


@pytest.mark.parametrize(("precision", "draft"), [("fp32", False), ("fp32", True), ("fp16", False)])
@pytest.mark.parametrize("lengths", [[7], [9, 0]], ids=str)
def test_fused_with_fixed_sizes(
    traced: Traced, tmp_path: Path, lengths: list[int], draft: bool, precision: str
) -> None:
    given = inputs(traced, lengths, draft=draft)
    graph = on_gpu(traced).tensorrt(precision, StepSize(len(lengths), T, T, draft), fused=True)
    kinds = [node.op_type for node in graph.graph]
    assert set(kinds) >= FUSED
    assert {node.inputs[3].dtype for node in graph.graph if node.op_type == "Attention"} == {DTYPES[precision]}
    wanted = traced.run(**given)
    scale = max(1.0, float(np.abs(wanted["logits"]).max()))
    agree(run(graph, tmp_path, given), wanted, 1e-4 if precision == "fp32" else 0.004 * scale)


def test_a_row_that_sees_nothing_stays_finite_in_16_bits(traced: Traced, tmp_path: Path) -> None:
    given = inputs(traced, [0], draft=False)
    given["tree_mask"][:, 3] = False
    found = run(on_gpu(traced).tensorrt("fp16", StepSize(1, T, T, draft=False), fused=True), tmp_path, given)
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("lengths", [[7], [9, 0]], ids=str)
@pytest.mark.parametrize("draft", [False, True])
def test_onnx_runtimes_graph_for_a_gpu(traced: Traced, tmp_path: Path, lengths: list[int], draft: bool) -> None:
    given = inputs(traced, lengths, draft=draft)
    graph = on_gpu(traced).ort_cuda("fp32")
    kinds = {node.op_type for node in graph.graph}
    assert {"RMSNormalization", "RotaryEmbedding", "SkipSimplifiedLayerNormalization"} <= kinds
    assert "Attention" not in kinds
    agree(run(graph, tmp_path, given), traced.run(**given), 1e-4)


def test_16_bits_stay_close(traced: Traced, tmp_path: Path) -> None:
    given = inputs(traced, [7], draft=False)
    wanted = traced.run(**given)
    scale = max(1.0, float(np.abs(wanted["logits"]).max()))
    found = run(on_gpu(traced).tensorrt("fp16", StepSize(1, T, T, draft=False)), tmp_path, given)
    narrow = {name for name, array in found.items() if array.dtype == np.float16}
    assert narrow == {name for name in wanted if name.startswith("new_")}
    agree(found, wanted, 0.004 * scale)


def test_softmax_norms_and_angles_are_in_fp32_whatever_the_rows(traced: Traced, tmp_path: Path) -> None:
    gpu = on_gpu(traced)
    for precision in ("fp16", "bf16"):
        graph = gpu.tensorrt(precision, StepSize(1, T, T, draft=True))
        ir.save(graph, tmp_path / "typed.onnx")
        onnx.checker.check_model(str(tmp_path / "typed.onnx"), full_check=True)
        of = {
            op: {node.inputs[0].dtype for node in graph.graph if node.op_type == op}
            for op in ("Softmax", "Sqrt", "Sin")
        }
        assert set().union(*of.values()) == {ir.DataType.FLOAT}
        products = [node for node in graph.graph if node.op_type in ("MatMul", "Gemm")]
        assert {node.inputs[1].dtype for node in products} == {DTYPES[precision], ir.DataType.FLOAT}
        wide = [node for node in products if node.inputs[1].dtype == ir.DataType.FLOAT]
        assert [node.op_type for node in wide] == ["Gemm"]  # the lm_head


@pytest.mark.parametrize("length", [7, 9])
def test_tensorrts_graph_is_stable_if_all_is_rounded_to_fp16(traced: Traced, tmp_path: Path, length: int) -> None:
    """Also with values in the thousands in the residual stream, whose squares overflow fp16."""
    given = inputs(traced, [length], draft=False)
    wanted = traced.run(**given)
    graph = on_gpu(traced).tensorrt("fp16", StepSize(1, T, T, draft=False))
    before = len(graph.graph)
    round_to_fp16(graph)
    assert len(graph.graph) - before > 100
    agree(run(graph, tmp_path, given, rounded=True), wanted, 0.02 * max(1.0, float(np.abs(wanted["logits"]).max())))


def test_rotary_embedding_at_a_far_position_in_16_bits(traced: Traced, tmp_path: Path) -> None:
    """An angle is the position times a frequency; rounded to 16 bits it would be wrong by a large part of a turn."""
    given = inputs(traced, [7], draft=False)
    given["position_ids"] = given["position_ids"] + CONTEXT - 20
    wanted = traced.run(**given)
    graph = on_gpu(traced).tensorrt("fp16", StepSize(1, T, T, draft=False))
    round_to_fp16(graph)
    found = run(graph, tmp_path, given, rounded=True)
    keys = wanted["new_key_0"]
    np.testing.assert_allclose(found["new_key_0"].astype(np.float32), keys, atol=0.004 * np.abs(keys).max())


def test_a_weight_beyond_16_bits_is_refused_by_name(traced: Traced) -> None:
    graph = ir.load(traced.path)
    value = next(node.inputs[1] for node in graph.graph if node.op_type == "MatMul")
    value.const_value = ir.tensor(value.const_value.numpy() * 1e6, name=value.name)
    expected = rf"{value.name} has values up to .*build with --precision bf16 or fp32"
    with pytest.raises(UnsupportedModelError, match=expected):
        cast_precision(graph, DTYPES["fp16"])
