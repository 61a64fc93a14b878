"""How far a graph's numbers may be from the model's, and where they first are further.

fp32 graphs add up in another order than the model does: 5e-6 of a row's range is usual. Where weights or activations
have fewer bits, `compare.tolerances` says what that costs, measured as shares of a tensor's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from medusa_runtime.backends.base import IntArray

from medusa_exporter.compare.tolerances import DIFFERENT_WEIGHTS, tolerance
from medusa_exporter.validation.graph_runner import StepResult
from medusa_exporter.validation.steps import FloatArray, ReferenceDraft, ReferenceStep, Rows

FP32 = 5e-5  # of a row's range
# The first layer's keys and values depend on the embedding, a norm, its own weights and the rope alone. Graphs of
# SmolLM2-135M-Instruct came to 0.01, 0.09 and 0.14, those of tiny models to less; with a sign of the rope turned to 0.9
# and more, with a norm's epsilon of 1e-2 to 0.35.
FIRST_LAYER = {"int8": 0.15, "w8a8": 0.25, "int4": 0.3}
LEAST_RANGE = 0.01  # of the widest row's range: a row that is nearly constant is measured by this


@dataclass(frozen=True)
class Limits:
    """error: of any element. gap: between the likeliest tokens of both sides where they are not the same; None for any.

    draft: between a head's logit of a candidate and that of the model's candidate of the same rank. by_row: whether
    errors and gaps are shares of a row's range; else of a tensor's largest magnitude. first_layer: root mean square of
    the errors of the first layer's keys and values, as a share of theirs; None where `error` is as tight.
    """

    error: float
    gap: float | None
    draft: float
    by_row: bool
    first_layer: float | None = None


@dataclass(frozen=True)
class Difference:
    """How far one tensor of a step is from the model's.

    part: "keys", "values", …; layer: None behind all layers. mean: whether it is the root mean square of all errors.
    """

    part: str
    layer: int | None
    error: float
    limit: float
    mean: bool = False

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; NaN is not."""
        return self.error <= self.limit


def limits(backend: str, precision: str) -> Limits:
    """Return what holds for a backend's graph in a precision.

    The CPU's heads have 8 bits in all of them, and are given the model's own hidden state. Which token is the likeliest
    is not asked of weights of fewer bits: some models' logits are closer to each other than what those cost.
    """
    heads = DIFFERENT_WEIGHTS["int8"].gap if backend == "ort-cpu" else None
    if precision == "fp32":
        return Limits(FP32, FP32, heads or FP32, by_row=True)
    both = tolerance("fp32", precision)
    gap = None if precision in DIFFERENT_WEIGHTS else both.gap
    return Limits(both.error, gap, heads or both.gap, by_row=False, first_layer=FIRST_LAYER.get(precision))


def differences(
    step: ReferenceStep, found: StepResult, limit: Limits, hidden_size: int, taps: tuple[int, ...]
) -> Iterator[Difference]:
    """Compare a step with the model's, in the order in which its parts are computed."""
    expected, got = step.expected, found.rows
    for layer in range(len(expected.keys)):
        for part, of_model, of_graph in (("keys", expected.keys, got.keys), ("values", expected.values, got.values)):
            yield Difference(part, layer, error(of_model[layer], of_graph[layer], limit), limit.error)
            if layer == 0 and limit.first_layer is not None:
                mean = mean_error(of_model[0], of_graph[0])
                yield Difference(part, 0, mean, limit.first_layer, mean=True)
    seen: tuple[int | None, ...] = (None, *taps)
    for at, tap in enumerate(seen):
        columns = slice(at * hidden_size, (at + 1) * hidden_size)
        name = "hidden state" if tap is None else "tapped input"
        yield Difference(name, tap, error(expected.hidden[:, columns], got.hidden[:, columns], limit), limit.error)
    logits = expected.logits[found.logit_rows]
    yield Difference("logits", None, error(logits, got.logits, limit), limit.error)
    if logits.size:
        yield Difference("argmax", None, _argmax_gap(logits, got, found.argmax, limit), limit.gap or 0.0)
    yield Difference("tokens", None, float(np.mean(found.tokens != step.ids)), 0.0)


def error(expected: FloatArray, got: FloatArray, limit: Limits) -> float:
    """Return the largest error in (n, …) rows, as a share of what `limit` measures by; inf for what is not finite."""
    if not expected.size:
        return 0.0
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return math.inf
    apart = np.abs(expected - got).max(axis=-1)  # (n,)
    scale = _scale(expected, limit)
    if not scale.all():
        return 0.0 if not apart[scale == 0].any() else math.inf
    return float((apart / scale).max())


def mean_error(expected: FloatArray, got: FloatArray) -> float:
    """Return the root mean square of all errors in (n, …) rows, as a share of that of what is expected."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(expected - got)) / size if size else 0.0


def draft_error(draft: ReferenceDraft, heads: IntArray, ranks: IntArray, tokens: IntArray) -> float:
    """Return how far the candidates (n,) of some heads and ranks are from the model's, in the heads' own logits.

    As a share of the range of a head's logits; inf for a token that the heads do not score.
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
    """(n,): what the errors of each row are shares of."""
    if not limit.by_row:
        return np.repeat(np.abs(expected).max(), len(expected)).astype(np.float32)
    ranges = np.ptp(expected, axis=-1)
    scale: FloatArray = np.maximum(ranges, LEAST_RANGE * ranges.max()).astype(np.float32)
    return scale


def _argmax_gap(expected: FloatArray, got: Rows, argmax: IntArray, limit: Limits) -> float:
    """Return how far the likeliest tokens (R,) are from the model's, in the logits of the side that is further apart.

    Where both are within the limits of logits, a near tie of the model's may be decided either way. 0.0 where no gap is
    asked for and the tokens are the likeliest of the graph's own logits.
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
