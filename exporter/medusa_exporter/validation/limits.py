"""Compares the values that a graph computes with the model's, and limits how far they may differ.

An fp32 graph adds up in another order than the model; 5e-6 of a row's range is usual. What fewer bits of weights or
activations cost was measured, as a share of a tensor's largest magnitude; the limits are in `compare.tolerances`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from medusa_runtime.backends.base import IntArray

from medusa_exporter.compare.row_summaries import SUMMARY_ERROR, summary_error
from medusa_exporter.compare.tolerances import DIFFERENT_WEIGHTS, tolerance
from medusa_exporter.validation.graph_runner import StepResult
from medusa_exporter.validation.steps import FloatArray, RecordedDraft, RecordedStep, Rows

FP32 = 5e-5  # of a row's range
# The first layer's keys and values depend only on the embedding, a norm, the layer's own weights and the rotary
# embedding. Graphs of SmolLM2-135M-Instruct differed by 0.01, 0.09 and 0.14, those of tiny models by less; with a wrong
# sign in the rotary embedding they differed by 0.9 and more, with a norm's epsilon of 1e-2 by 0.35.
FIRST_LAYER = {"int8": 0.15, "w8a8": 0.25, "int4": 0.3}
MIN_RANGE = 0.01  # of the widest row's range; the range of a row that is nearly constant is taken as this


@dataclass(frozen=True)
class Limits:
    """How far a graph may differ from the model.

    Attributes:
        error: The largest error of any element.
        gap: The largest difference between the logits of both sides' most likely tokens, if these are not the same;
            None if it is not limited.
        draft: The largest difference between a head's logits of the graph's candidate and of the model's candidate of
            the same rank.
        by_row: Whether errors and gaps are shares of a row's range, and not of a tensor's largest magnitude.
        first_layer: The largest root mean square error of the first layer's keys and values, as a share of their own
            root mean square; None if `error` is as tight.
    """

    error: float
    gap: float | None
    draft: float
    by_row: bool
    first_layer: float | None = None


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor of a step differs from the model's.

    Attributes:
        part: What is compared: "keys", "values", "hidden state", "logits", ….
        layer: Number of the layer; None after all layers.
        error: The error, and `limit` the largest that is accepted.
        mean: Whether the error is the root mean square of all elements, and not the largest.
    """

    part: str
    layer: int | None
    error: float
    limit: float
    mean: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


def limits(backend: str, precision: str) -> Limits:
    """Return the limits for a backend's graph in a precision.

    Heads have 8 bits in every graph for the CPU; their input is the model's own hidden state. The most likely token is
    not compared if weights have fewer bits: some models' logits are closer to each other than the error that this
    causes.
    """
    heads = DIFFERENT_WEIGHTS["int8"].gap if backend == "ort-cpu" else None
    if precision == "fp32":
        return Limits(FP32, FP32, heads or FP32, by_row=True)
    both = tolerance("fp32", precision)
    gap = None if precision in DIFFERENT_WEIGHTS else both.gap
    return Limits(both.error, gap, heads or both.gap, by_row=False, first_layer=FIRST_LAYER.get(precision))


def tensor_differences(
    step: RecordedStep, found: StepResult, limit: Limits, hidden_size: int, taps: tuple[int, ...]
) -> Iterator[TensorDifference]:
    """Compare the result of a step with the model's, in the order in which its parts are computed."""
    expected, got = step.expected, found.rows
    for layer in range(len(expected.keys)):
        for part, of_model, of_graph in (("keys", expected.keys, got.keys), ("values", expected.values, got.values)):
            yield TensorDifference(part, layer, error(of_model[layer], of_graph[layer], limit), limit.error)
            if layer == 0 and limit.first_layer is not None:
                mean = mean_error(of_model[0], of_graph[0])
                yield TensorDifference(part, 0, mean, limit.first_layer, mean=True)
    seen: tuple[int | None, ...] = (None, *taps)
    for at, tap in enumerate(seen):
        columns = slice(at * hidden_size, (at + 1) * hidden_size)
        name = "hidden state" if tap is None else "tapped input"
        yield TensorDifference(
            name, tap, error(expected.hidden[:, columns], got.hidden[:, columns], limit), limit.error
        )
    logits = expected.logits[found.logit_rows]
    yield TensorDifference("logits", None, error(logits, got.logits, limit), limit.error)
    if logits.size:
        yield TensorDifference("argmax", None, _argmax_gap(logits, got, found.argmax, limit), limit.gap or 0.0)
        if found.summaries is not None:
            yield TensorDifference("summaries", None, summary_error(got.logits, found.summaries), SUMMARY_ERROR)
    yield TensorDifference("tokens", None, float(np.mean(found.tokens != step.ids)), 0.0)


def error(expected: FloatArray, got: FloatArray, limit: Limits) -> float:
    """Return the largest error in rows (n, …), as a share of the scale that `limit` names; inf if any is not finite."""
    if not expected.size:
        return 0.0
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return math.inf
    errors = np.abs(expected - got).max(axis=-1)  # (n,)
    scale = _scale(expected, limit)
    if not scale.all():
        return 0.0 if not errors[scale == 0].any() else math.inf
    return float((errors / scale).max())


def mean_error(expected: FloatArray, got: FloatArray) -> float:
    """Return the root mean square error of rows (n, …), as a share of the root mean square of `expected`."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(expected - got)) / size if size else 0.0


def draft_error(draft: RecordedDraft, heads: IntArray, ranks: IntArray, tokens: IntArray) -> float:
    """Return how far a graph's candidates differ from the model's, in the logits of the heads.

    Args:
        draft: What the model's heads compute.
        heads: Number of the head of each candidate, (n,).
        ranks: Rank of each candidate among those of its head, (n,).
        tokens: The graph's candidates, (n,).

    Returns:
        The largest difference as a share of the range of a head's logits; inf for a token that the heads do not score.
    """
    worst = 0.0
    for head, rank, token in zip(heads.tolist(), ranks.tolist(), tokens.tolist(), strict=True):
        logits = draft.logits[head]
        column = np.flatnonzero(draft.tokens == token)
        if not len(column):
            return math.inf
        wanted = np.sort(logits)[-1 - rank]
        worst = max(worst, abs(float(wanted - logits[column[0]])) / (float(np.ptp(logits)) or 1.0))
    return worst


def _scale(expected: FloatArray, limit: Limits) -> FloatArray:
    """Return the value that each row's errors are divided by, (n,)."""
    if not limit.by_row:
        return np.repeat(np.abs(expected).max(), len(expected)).astype(np.float32)
    ranges = np.ptp(expected, axis=-1)
    scale: FloatArray = np.maximum(ranges, MIN_RANGE * ranges.max()).astype(np.float32)
    return scale


def _argmax_gap(expected: FloatArray, got: Rows, argmax: IntArray, limit: Limits) -> float:
    """Return how far the model's logits of the graph's most likely tokens (R,) are below the model's maximum.

    If logits are within their limits, a near tie may be decided either way. inf if a token is not the most likely one
    by the graph's own logits. 0.0 if no gap is limited.
    """
    rows = np.arange(len(expected))
    if argmax.min() < 0 or argmax.max() >= expected.shape[-1]:
        return math.inf
    models = expected.argmax(axis=-1)
    of_model = expected[rows, models] - expected[rows, argmax]
    of_graph = got.logits.max(axis=-1) - got.logits[rows, argmax]  # its own argmax is exact
    if of_graph.any():
        return math.inf
    if limit.gap is None:
        return 0.0
    worst = float((of_model / _scale(expected, limit)).max())
    return worst if math.isfinite(worst) else math.inf
