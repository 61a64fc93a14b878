"""Row summaries against numpy: exact tokens and logits, ties, rows that are not finite, and no rows at all."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_exporter.graph.decompose import OPSET, move_axes_to_attribute
from medusa_exporter.graph.row_summaries import BLOCK, summarise_rows
from medusa_runtime import contract
from numpy.typing import NDArray
from onnx import TensorProto, helper

Floats = NDArray[np.float32]
LENGTHS = [1, 5, 63, 64, 65, 251, 256, 257, 300, 1000, 4096, 4097, 8191, 16384, 32001, 49152]
FORMS = ["free", "single", "fixed", "tensorrt"]


def model(V: int, form: str, sizes: tuple[int, int, int] = (1, 4, 4)) -> ir.Model:
    """A graph whose `logits` are an input plus 0, summarised in the form of one of the variants."""
    fixed = {
        "free": {},
        "single": {"B": 1},
        "fixed": dict(zip("BRS", sizes, strict=True)),
        "tensorrt": dict(zip("BRS", sizes, strict=True)),
    }[form]
    shape = [fixed.get("B", "B"), fixed.get("R", "R")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["logits"])],
        "rows",
        [
            helper.make_tensor_value_info("logit_rows", TensorProto.INT32, shape),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, V]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, V]),
            helper.make_tensor_value_info("logit_rows_too", TensorProto.INT32, shape),
        ],
    )
    graph.node.append(helper.make_node("Identity", ["logit_rows"], ["logit_rows_too"]))
    opset = helper.make_opsetid("", OPSET if form == "tensorrt" else 23)
    made = ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=10))
    summarise_rows(made.graph, V, fixed, tensorrt=form == "tensorrt")
    if form == "tensorrt":
        for node in made.graph:
            if node.op_type in ("ReduceMax", "ReduceMin"):
                move_axes_to_attribute(node)
    return made


def session(graph: ir.Model) -> onnxruntime.InferenceSession:
    for index, node in enumerate(graph.graph):
        for position, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"n{index}_{position}"
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def run(graph: ir.Model, logits: Floats, rows: NDArray[np.int32] | None = None) -> list[NDArray[Any]]:
    B, R, _ = logits.shape
    chosen = np.tile(np.arange(R, dtype=np.int32), (B, 1)) if rows is None else rows
    given = {"x": logits, "logit_rows": np.zeros((B, R), np.int32), contract.SUMMARY_ROWS: chosen}
    found: list[NDArray[Any]] = session(graph).run(list(contract.SUMMARY_OUTPUTS), given)
    return found


def check(found: list[NDArray[Any]], logits: Floats, flagged: Floats | None = None) -> None:
    """Compare summaries with the finite ones of the rows (B, S, V); of all rows (B, R, V), the flags."""
    B, S, V = logits.shape
    K, finite = min(64, V), np.isfinite(logits).all(-1)
    flags, ids, top, logsumexp = found
    assert [array.shape for array in (ids, top, logsumexp)] == [(B, S, K), (B, S, K), (B, S)]
    np.testing.assert_array_equal(flags, np.isfinite(logits if flagged is None else flagged).all(-1))
    for row, chosen, values, total in zip(logits[finite], ids[finite], top[finite], logsumexp[finite], strict=True):
        assert len(set(chosen.tolist())) == K
        np.testing.assert_array_equal(row[chosen], values)
        np.testing.assert_array_equal(np.sort(row)[::-1][:K], values)  # equal logits may be those of any tokens
        wide = row.astype(np.float64)
        wanted = np.log(np.exp(wide - wide.max()).sum()) + wide.max()
        np.testing.assert_allclose(total, wanted, rtol=5e-6, atol=5e-6)  # of a sum in fp32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("V", LENGTHS)
def test_summaries_are_exact(V: int, form: str) -> None:
    rng, shape = np.random.default_rng(V), (1, 4, V)
    graph = model(V, form)
    for logits in (
        rng.normal(scale=4, size=shape),
        rng.integers(-2, 2, shape),  # most logits are equal, also at the 64th
        np.zeros(shape),
        np.sort(rng.normal(size=shape)),  # the top is in the last block …
        -np.sort(rng.normal(size=shape)),  # … or in the first
        rng.normal(scale=1e30, size=shape),
        np.where(rng.random(shape) < 0.001, -0.0, 0.0),
    ):
        check(run(graph, logits.astype(np.float32)), logits.astype(np.float32))


@pytest.mark.parametrize(("form", "exact"), [("free", False), ("tensorrt", True)])
def test_the_largest_finite_logits(form: str, exact: bool) -> None:
    """ONNX Runtime's flag is false where the sum of the row overflows; the other outputs are those of a finite row."""
    logits = np.full((1, 4, 5000), np.finfo(np.float32).max, np.float32)
    logits[0, 1] *= -1
    logits[0, 2:] = 1e34 * np.where(np.arange(5000) % 2, 1, -1), np.linspace(-6e34, 6e34, 5000)
    finite, ids, top, _ = run(model(5000, form, (1, 4, 4)), logits)
    assert finite.tolist() == [[exact, exact, True, True]]
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, -1), top)
    np.testing.assert_array_equal(np.sort(logits)[..., ::-1][..., :64], top)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("V", [40, 300, 5000, 49152])
def test_a_row_that_is_not_finite_is_reported_and_leaves_the_others(V: int, form: str) -> None:
    rng = np.random.default_rng(V)
    graph = model(V, form, (1, 9, 9))
    logits = rng.normal(size=(1, 9, V)).astype(np.float32)
    for row, places, value in (
        (0, slice(None), np.nan),
        (1, V - 1, np.nan),
        (2, 0, np.inf),
        (3, V // 2, -np.inf),
        (4, slice(None), -np.inf),
        (5, slice(None), np.inf),
        (6, slice(5, None), -np.inf),
        (7, slice(0, 2), [np.inf, -np.inf]),
    ):
        logits[0, row, places] = value
    found = run(graph, logits)
    assert found[0].tolist() == [[*[False] * 8, True]]
    check(found, logits)


@pytest.mark.parametrize("form", FORMS)
def test_equal_largest_logits_wherever_they_are(form: str) -> None:
    """100 of them, of which 64 fit, spread over few and over many blocks."""
    V, rng = 49152, np.random.default_rng(8)
    graph, logits = model(V, form, (1, 6, 6)), rng.normal(size=(1, 6, V)).astype(np.float32)
    for row, width in enumerate((100, 1000, 7000, V, V, V)):
        first = rng.integers(0, V - width + 1)
        logits[0, row, first + rng.permutation(width)[:100]] = 50
    check(run(graph, logits), logits)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 10, 200]), st.sampled_from([70, 4200, 20011]))
def test_any_pattern_of_ties(seed: int, levels: int, V: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, (1, 2, V)) ** rng.integers(1, 4)
    for form in ("free", "tensorrt"):
        check(run(_model_of(V, form), logits.astype(np.float32)), logits.astype(np.float32))


@functools.cache
def _model_of(V: int, form: str) -> ir.Model:
    return model(V, form, (1, 2, 2))


@pytest.mark.parametrize(("form", "B"), [("free", 1), ("free", 3), ("single", 1), ("fixed", 3), ("tensorrt", 2)])
@pytest.mark.parametrize("V", [60, 5000])
def test_rows_are_chosen_by_index_for_each_sequence(form: str, B: int, V: int) -> None:
    rng, R, S = np.random.default_rng(B), 5, 5 if form in ("fixed", "tensorrt") else 3
    logits = rng.normal(size=(B, R, V)).astype(np.float32)
    rows = rng.integers(0, R, (B, S)).astype(np.int32)
    found = run(model(V, form, (B, R, S)), logits, rows)
    check(found, np.take_along_axis(logits, rows[..., None], axis=1), logits)


@pytest.mark.parametrize("form", ["free", "single"])
@pytest.mark.parametrize("V", LENGTHS)
def test_no_rows_give_no_summaries(V: int, form: str) -> None:
    found = run(model(V, form), np.zeros((1, 3, V), np.float32), np.zeros((1, 0), np.int32))
    assert [array.shape for array in found] == [(1, 3), (1, 0, min(64, V)), (1, 0, min(64, V)), (1, 0)]
    assert found[0].all()  # the flags are those of all rows


def test_inputs_and_outputs_stand_where_the_contract_has_them() -> None:
    made = model(5000, "free").graph
    assert [value.name for value in made.inputs] == ["logit_rows", "summary_rows", "x"]
    assert [value.name for value in made.outputs] == ["logits", *contract.SUMMARY_OUTPUTS, "logit_rows_too"]
    specs = {spec.name: spec for spec in contract.summary_specs(5000)}
    for value in made.outputs:
        if value.name in specs:
            assert [size if isinstance(size, int) else size.value for size in value.shape] == list(
                specs[value.name].shape
            )


def test_only_tensorrt_searches_in_blocks_and_only_where_there_are_many() -> None:
    def kinds(V: int, form: str) -> list[str]:
        return [node.op_type for node in model(V, form).graph]

    assert [kinds(V, "tensorrt").count("TopK") for V in (64 * BLOCK, 64 * BLOCK + 1)] == [1, 2]
    assert [kinds(49152, form).count("TopK") for form in FORMS] == [1, 1, 1, 2]


@pytest.mark.parametrize("form", ["free", "single", "fixed"])
@pytest.mark.parametrize("V", LENGTHS)
def test_no_operator_of_onnx_runtimes_graph_reads_by_what_a_topk_found(V: int, form: str) -> None:
    """Where a row has NaN, its places may lie outside of the row."""
    for node in model(V, form).graph:
        if node.op_type == "TopK":
            assert [user.op_type for user in node.outputs[1].consumers()] == ["Cast"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("V", [40, 300, 5000])
def test_no_output_is_a_mere_copy(V: int, form: str) -> None:
    """Outputs are in pinned host memory, which a GPU's kernels write, but copies between device memories may not."""
    outputs = [value for value in model(V, form).graph.outputs if value.name in contract.SUMMARY_OUTPUTS]
    kinds = [value.producer().op_type for value in outputs]  # type: ignore[union-attr]
    assert kinds == ["And" if form == "tensorrt" else "Less", "Cast", "TopK", "Add"]
