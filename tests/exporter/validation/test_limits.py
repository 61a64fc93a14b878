"""The rules by which differences are measured, on made-up rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from medusa_exporter.compare.tolerances import DIFFERENT_WEIGHTS, tolerance
from medusa_exporter.precisions import PRECISIONS
from medusa_exporter.validation.graph_runner import StepResult
from medusa_exporter.validation.limits import FP32, Limits, draft_error, error, limits, tensor_differences
from medusa_exporter.validation.steps import Past, RecordedDraft, RecordedStep, Rows

BY_ROW, BY_TENSOR = limits("ort-cuda", "fp32"), limits("ort-cuda", "fp16")


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize("backend", PRECISIONS)
def test_limits_of_each_precision(backend: str) -> None:
    for precision in PRECISIONS[backend]:
        found = limits(backend, precision)
        assert found.by_row is (precision == "fp32")
        assert found.error == (FP32 if found.by_row else tolerance("fp32", precision).error)
        assert (found.gap is None) is (found.first_layer is not None) is (precision in DIFFERENT_WEIGHTS)
        others = FP32 if found.by_row else tolerance("fp32", precision).gap
        assert found.draft == (DIFFERENT_WEIGHTS["int8"].gap if backend == "ort-cpu" else others)


def test_fp32_is_measured_by_each_rows_range() -> None:
    # but by a hundredth of the widest range at least
    expected = rows([0, 1000], [5, 6])
    assert error(expected, expected + rows([1, 0], [0, 0]), BY_ROW) == pytest.approx(1e-3)
    assert error(expected, expected + rows([0, 0], [0, 1]), BY_ROW) == pytest.approx(0.1)
    assert error(rows([0, 2]), rows([0, 1]), BY_ROW) == 0.5


def test_fewer_bits_are_measured_by_the_largest_magnitude() -> None:
    assert error(rows([0, 1000], [5, 6]), rows([0, 1000], [5, 7]), BY_TENSOR) == pytest.approx(1e-3)


@pytest.mark.parametrize("limit", [BY_ROW, BY_TENSOR])
def test_what_is_not_finite_or_constant(limit: Limits) -> None:
    for wrong in (math.nan, math.inf):
        assert error(rows([1, 2]), rows([1, wrong]), limit) == math.inf
    zeros = rows([0, 0], [0, 0])
    assert error(zeros, zeros, limit) == 0.0
    assert error(zeros, zeros + 1e-6, limit) == math.inf
    assert error(zeros[:, :0], zeros, limit) == 0.0  # nothing was kept to compare with


def step(logits: np.ndarray) -> RecordedStep:
    n, nothing = len(logits), np.zeros((2, 0, 4), np.float32)
    kept = Rows(np.ones((2, n, 4), np.float32), np.ones((2, n, 4), np.float32), np.ones((n, 6), np.float32), logits)
    at = np.arange(n, dtype=np.int32)
    return RecordedStep("plain", at, at, np.tri(n, dtype=np.bool_), Past(nothing, nothing), kept)


def found(one: RecordedStep, logits: np.ndarray, argmax: list[int]) -> StepResult:
    kept = one.expected
    every = np.arange(one.nodes, dtype=np.int32)
    return StepResult(Rows(kept.keys, kept.values, kept.hidden, logits), every, np.array(argmax, np.int32), one.ids)


def failed(logits: np.ndarray, got: np.ndarray, argmax: list[int]) -> list[str]:
    one = step(logits)
    return [d.part for d in tensor_differences(one, found(one, got, argmax), BY_ROW, 6, ()) if not d.passed]


def test_a_near_tie_may_be_decided_either_way() -> None:
    near, other = rows([0, 10, 10.0002]), rows([0, 10.0002, 10])
    assert failed(near, near, [2]) == failed(near, other, [1]) == []
    assert failed(near, near, [1]) == ["argmax"]  # not the most likely by its own logits
    assert failed(near, near, [7]) == ["argmax"]  # no token
    far = rows([0, 10, 11])
    assert failed(far, rows([0, 11, 10]), [1]) == ["logits", "argmax"]


def test_fewer_bits_may_choose_another_token_but_the_most_likely_by_their_own_logits() -> None:
    one, limit = step(rows([0, 10, 11])), limits("ort-cpu", "int4")
    for argmax, failed_parts in ((1, []), (2, ["argmax"])):
        tried = found(one, rows([0, 11, 2]), [argmax])
        assert [d.part for d in tensor_differences(one, tried, limit, 6, ()) if not d.passed] == failed_parts


def test_the_first_layer_has_a_limit_of_its_own_in_fewer_bits() -> None:
    one = step(rows([0, 10, 11]))
    tried = found(one, one.expected.logits, [2])
    for layer, failed_at in ((0, [("values", 0, True)]), (1, [])):
        values = one.expected.values.copy()
        values[layer] *= 1.35
        moved = replace(tried, rows=replace(tried.rows, values=values))
        failing = [d for d in tensor_differences(one, moved, limits("ort-cpu", "int4"), 6, ()) if not d.passed]
        assert [(d.part, d.layer, d.mean) for d in failing] == failed_at


def test_differences_come_in_the_order_of_layers() -> None:
    one = step(rows([0, 1, 2]))
    parts = [(d.part, d.layer) for d in tensor_differences(one, found(one, one.expected.logits, [2]), BY_ROW, 3, (1,))]
    assert parts[:4] == [("keys", 0), ("values", 0), ("keys", 1), ("values", 1)]
    assert parts[4:] == [
        ("hidden state", None),
        ("tapped input", 1),
        ("logits", None),
        ("argmax", None),
        ("tokens", None),
    ]


def test_candidates_are_held_against_the_heads_logits() -> None:
    nothing = np.zeros((2, 0, 4), np.float32)
    tokens = np.array([40, 50, 60], np.int32)
    draft = RecordedDraft(3, rows([0])[0], Past(nothing, nothing), rows([0, 9, 10], [4, 0, 2]), tokens)

    def of(*given: tuple[int, int, int]) -> float:
        return draft_error(draft, *(np.array(column, np.int32) for column in zip(*given, strict=True)))

    assert of((0, 0, 60), (0, 1, 50), (1, 0, 40), (1, 2, 50)) == 0.0
    assert of((0, 0, 50)) == pytest.approx(0.1)  # the second in place of the first, a tenth of the range below it
    assert of((0, 0, 60), (1, 0, 50)) == 1.0
    assert of((0, 0, 41)) == math.inf  # which the heads do not score
