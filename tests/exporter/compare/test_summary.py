"""What counts as equal: ties of argmax, candidates whatever their rank, each part of the hidden state separately."""

from __future__ import annotations

import math

import numpy as np
import pytest
from medusa_exporter.compare import formatting
from medusa_exporter.compare.steps import Kind, ReferenceStep, StepInputs
from medusa_exporter.compare.summary import ComparisonSummary
from medusa_exporter.compare.tolerances import SAME_WEIGHTS, Tolerance, tolerance
from medusa_profiles.profile import TreeProfile
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import HeadFacts, ModelFacts

MODEL = ModelFacts("m", "llama", 2, 4, 2, 1, 3, 10, 64, ())
HEADS = HeadFacts(2, 1, "none", 4, taps=(1,))
TREE = TreeProfile("tree", ((0,), (1,), (2,), (0, 0), (0, 1)))
TOKENS = [5, 1, 2, 3, 7, 8]


def outputs(T: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(T)
    logits = rng.uniform(-1, 1, (1, T, 10)).astype(np.float32)
    logits[..., 4], logits[..., 6] = 10, 9.99
    return {
        "tokens": np.array([TOKENS[:T]], np.int32),
        "argmax": np.full((1, T), 4, np.int32),
        "logits": logits,
        "hidden": np.concatenate([np.ones((1, T, 4)), np.full((1, T, 4), 1000)], -1).astype(np.float32),
        **{f"new_{kind}_{i}": np.full((1, T, 3), i + 1, np.float32) for kind in ("key", "value") for i in (0, 1)},
    }


def compared(limits: Tolerance, *changed: dict[str, np.ndarray], kind: Kind = "tree") -> ComparisonSummary:
    """Steps of which the other side gave something else."""
    outcome = ComparisonSummary(MODEL, HEADS, TREE, limits)
    for number, change in enumerate(changed, start=1):
        T = TREE.size if kind == "tree" else 1
        ids = TREE.candidate_ids(4) if kind == "tree" else np.array([5], np.int32)
        ids[0] = 5
        expected = outputs(T)
        outcome.add(ReferenceStep(StepInputs(3, number, kind, ids, 9), expected, [0]), expected | change)
    return outcome


def change(name: str, at: tuple[int, ...], by: float, T: int = TREE.size) -> dict[str, np.ndarray]:
    array = outputs(T)[name]
    array[at] += by
    return {name: array}


def test_equal_steps_pass_and_every_group_has_a_row() -> None:
    outcome = compared(SAME_WEIGHTS["fp32"], {}, {})
    groups = ["tokens", "candidates", "argmax", "logits", "hidden", "taps", "keys", "values"]
    assert [row.group for row in outcome.rows()] == groups
    assert all(row.passed and row.error == 0 for row in outcome.rows())
    assert (outcome.worst(), outcome.steps) == (None, 2)
    assert [row.group for row in compared(SAME_WEIGHTS["fp32"], {}, kind="plain").rows()] == [
        group for group in groups if group != "candidates"
    ]


@pytest.mark.parametrize(("ours", "theirs"), [(None, 0.5), (0.5, None), (0.5, 1e-7), (1e-7, 0.5), (1e-7, math.inf)])
def test_summaries_of_either_side_that_are_wrong_fail(ours: float | None, theirs: float | None) -> None:
    outcome, expected = ComparisonSummary(MODEL, HEADS, TREE, SAME_WEIGHTS["int4"]), outputs(1)
    inputs = StepInputs(3, 1, "plain", np.array([5], np.int32), 9)
    outcome.add(ReferenceStep(inputs, expected, [0], 1e-7), expected, 2e-7)
    (passing,) = (row for row in outcome.rows() if row.group == "summaries")
    assert passing.passed and passing.error == 2e-7
    outcome.add(ReferenceStep(inputs, expected, [0], ours), expected, theirs)
    worst = outcome.worst()
    assert worst is not None and (worst.group, worst.error) == ("summaries", max(ours or 0, theirs or 0))


@pytest.mark.parametrize(
    ("name", "at", "by", "told", "layer"),
    [
        ("logits", (0, 2, 1), 0.2, "logits", None),
        ("hidden", (0, 5, 3), 0.02, "hidden", None),
        ("hidden", (0, 5, 4), 20, "tap_1", 1),
        ("new_key_1", (0, 1, 2), 0.05, "new_key_1", 1),
        ("new_value_0", (0, 0, 0), -0.05, "new_value_0", 0),
        ("new_value_0", (0, 0, 0), np.nan, "new_value_0", 0),
        ("tokens", (0, 0), 1, "tokens", None),
    ],
)
def test_a_changed_tensor_is_named_with_its_place(
    name: str, at: tuple[int, ...], by: float, told: str, layer: int | None
) -> None:
    outcome = compared(Tolerance(0.01, 0.01, 0.9), {}, change(name, at, by), {})
    worst = outcome.worst()
    assert worst is not None
    assert (worst.name, worst.prompt, worst.step, worst.layer, worst.kind) == (told, 3, 2, layer, "tree")
    assert [row.passed for row in outcome.rows()].count(False) == 1
    line = formatting.mismatch(worst, outcome.first, "a:fp32", "b:fp16")
    assert line.startswith(f"b:fp16 is not equal to a:fp32 within tolerance: worst is {told} ")
    assert "prompt 3, step 2" in line
    assert "FAILS" in formatting.table(outcome.rows())
    (row,) = (row for row in formatting.as_json(outcome.rows()) if not row["passed"])
    assert row["name"] == told
    assert row["error"] is None or math.isfinite(row["error"])


def test_an_error_in_h_does_not_hide_behind_a_large_tap() -> None:
    outcome = compared(Tolerance(0.01, 0.01, 0.9), change("hidden", (0, 0, 0), 0.5))
    assert (outcome.worst().name, outcome.worst().error) == ("hidden", 0.5)  # type: ignore[union-attr]


def test_argmax_may_differ_where_the_two_tokens_tie() -> None:
    tie = {"argmax": np.array([[4, 6, 4, 4, 4, 4]], np.int32)}
    outcome = compared(Tolerance(0.01, 2e-3, 0.9), tie)
    (row,) = (row for row in outcome.rows() if row.group == "argmax")
    assert row.passed
    assert row.error == pytest.approx(0.001, rel=1e-2)  # 0.01 logits of 10
    assert compared(Tolerance(0.01, 5e-4, 0.9), tie).worst().name == "argmax"  # type: ignore[union-attr]


@pytest.mark.parametrize("token", [1, -1, 10, 2**31 - 1])
def test_argmax_may_not_differ_otherwise(token: int) -> None:
    wrong = {"argmax": np.array([[4, 4, 4, 4, 4, token]], np.int32)}
    worst = compared(Tolerance(0.01, 2e-3, 0.9), {}, wrong).worst()
    assert worst is not None
    assert (worst.name, worst.step) == ("argmax", 2)
    assert (worst.error == np.inf) == (not 0 <= token < 10)


def test_a_tie_is_one_by_both_sides_logits() -> None:
    logits = outputs(TREE.size)["logits"]
    logits[0, 1, 6] = 10.05
    wrong = {"argmax": np.array([[4, 6, 4, 4, 4, 4]], np.int32), "logits": logits}
    (row,) = (row for row in compared(Tolerance(0.01, 2e-3, 0.9), wrong).rows() if row.group == "argmax")
    assert (row.passed, row.error) == (False, pytest.approx(0.005, rel=1e-2))


def test_candidates_are_counted_by_head_whatever_their_rank_over_all_steps() -> None:
    swapped = {"tokens": np.array([[5, 7, 3, 2, 8, 1]], np.int32)}
    assert compared(Tolerance(0.01, 0.01, 1.0), swapped, swapped).worst() is None
    of_another_head = {"tokens": np.array([[5, 2, 1, 3, 7, 8]], np.int32)}  # each has lost one of its own
    outcome = compared(Tolerance(0.01, 0.01, 0.8), {}, of_another_head)
    (row,) = (row for row in outcome.rows() if row.group == "candidates")
    assert (row.passed, row.error, row.step) == (True, pytest.approx(2 / 10), 2)
    assert compared(Tolerance(0.01, 0.01, 0.81), {}, of_another_head).worst().name == "tokens"  # type: ignore[union-attr]


def test_the_worst_is_the_furthest_beyond_its_tolerance() -> None:
    both = change("new_key_0", (0, 0, 0), 0.03) | change("new_value_1", (0, 0, 0), 0.2)
    outcome = compared(Tolerance(0.01, 0.01, 0.9), {}, change("hidden", (0, 0, 0), 0.05), both)
    worst, first = outcome.worst(), outcome.first
    assert worst is not None and first is not None
    assert (worst.name, worst.step, worst.error) == ("new_value_1", 3, pytest.approx(0.1))
    assert (first.name, first.step) == ("hidden", 2)
    line = formatting.mismatch(worst, first, "a:fp32", "b:fp16")
    assert line.endswith("; the first is hidden of the tree step at prompt 3, step 2")


def test_tolerances_are_those_of_the_coarser_side() -> None:
    for one in SAME_WEIGHTS:
        assert tolerance(one, one) == SAME_WEIGHTS[one]
        for other in SAME_WEIGHTS:
            found = tolerance(one, other)
            assert found == tolerance(other, one)
            assert found.error >= max(SAME_WEIGHTS[one].error, SAME_WEIGHTS[other].error)
    assert tolerance("fp32", "fp32").error < tolerance("fp32", "fp16").error < tolerance("fp16", "bf16").error
    assert tolerance("int8", "int8").error < tolerance("fp32", "int8").error < tolerance("int8", "int4").error
    with pytest.raises(MedusaError, match="no tolerance for precision 'fp8'; expected one of fp32, "):
        tolerance("fp32", "fp8")
