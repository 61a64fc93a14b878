"""Summarises a comparison: the error of each tensor in each step, and the worst for each group and kind of step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, IntArray, StepOutputs
from medusa_runtime.facts import HeadFacts, ModelFacts

from medusa_exporter.compare.arrays import compare_arrays
from medusa_exporter.compare.row_summaries import SUMMARY_ERROR
from medusa_exporter.compare.steps import KINDS, Kind, ReferenceStep, StepInputs
from medusa_exporter.compare.tensors import float_tensors, parse_name
from medusa_exporter.compare.tolerances import Tolerance

CANDIDATES = "candidates"
SUMMARIES = "summaries"
GROUPS = (contract.TOKENS, CANDIDATES, contract.ARGMAX, SUMMARIES, "logits", "hidden", "taps", "keys", "values")


@dataclass(frozen=True)
class TensorResult:
    """How far one tensor of one step is from the reference's.

    Attributes:
        kind: Kind of the step.
        group: What the tensor is, one of GROUPS.
        name: Name of the tensor.
        error: The error as a share of the largest magnitude in the reference's tensor. For the group argmax it is the
            widest gap between the two sides' tokens, as a share of the logits' largest magnitude; for tokens and
            candidates it is the share of ids that differ; for summaries how far those of either side are from the
            logits of the same side.
        tolerance: The largest error that passes.
        passed: Whether the error is within the tolerance.
        prompt: As in `steps.StepInputs`.
        step: As in `steps.StepInputs`.
        layer: Number of the layer; None for tensors that belong to no single layer.
    """

    kind: Kind
    group: str
    name: str
    error: float
    tolerance: float
    passed: bool
    prompt: int
    step: int
    layer: int | None = None

    @property
    def severity(self) -> tuple[bool, float]:
        """A sort key: the worse of two results has the greater one."""
        error = math.inf if math.isnan(self.error) else self.error
        return not self.passed, error / self.tolerance if self.tolerance else error

    @property
    def where(self) -> str:
        """Prompt, step and layer, in words."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"prompt {self.prompt}, step {self.step}{layer}"


class ComparisonSummary:
    """Collects the results of a comparison, step by step.

    Attributes:
        steps: Number of steps compared.
        first: The first result beyond its tolerance, in the order of the steps and of the layers within a step; None if
            there is none.
    """

    def __init__(self, model: ModelFacts, heads: HeadFacts, tree: TreeProfile, limits: Tolerance) -> None:
        self._hidden_size, self._taps = model.hidden_size, heads.taps
        self._depths, self._limits = tree.depths, limits
        self._worst: dict[tuple[Kind, str], TensorResult] = {}
        self._candidates = self._shared = 0  # candidates of the reference, and those that the other side has too
        self.steps = 0
        self.first: TensorResult | None = None

    def add(self, step: ReferenceStep, outputs: StepOutputs, summary_error: float | None = None) -> None:
        """Compare the other side's outputs of one step with the reference's.

        Args:
            step: The step, with the reference's outputs.
            outputs: The other side's outputs.
            summary_error: How far the other side's summaries are from its own logits; None if it has none.

        Raises:
            MedusaError: Names or shapes of the outputs differ.
        """
        self.steps += 1
        errors = [one for one in (step.summary_error, summary_error) if one is not None]
        for result in self._results(step.inputs, step.outputs, outputs, max(errors, default=None)):
            key = result.kind, result.group
            if key not in self._worst or result.severity > self._worst[key].severity:
                self._worst[key] = result
            if self.first is None and not result.passed and result.group != CANDIDATES:
                self.first = result

    def rows(self) -> list[TensorResult]:
        """Return the worst result of each kind of step and group; for candidates the share over all steps."""
        found = [self._worst[kind, group] for kind in KINDS for group in GROUPS if (kind, group) in self._worst]
        return [self._over_all_steps(one) if one.group == CANDIDATES else one for one in found]

    def worst(self) -> TensorResult | None:
        """Return the result furthest beyond its tolerance; None where all are within."""
        return max((one for one in self.rows() if not one.passed), key=lambda one: one.severity, default=None)

    def _results(
        self, inputs: StepInputs, expected: StepOutputs, got: StepOutputs, summary_error: float | None
    ) -> Iterator[TensorResult]:
        def of_ids(group: str, name: str, error: float, tolerance: float) -> TensorResult:
            passed = error <= tolerance
            return TensorResult(inputs.kind, group, name, error, tolerance, passed, inputs.prompt, inputs.step)

        error, gap = self._limits.error, self._limits.gap
        reference, other = (float_tensors(outputs, self._hidden_size, self._taps) for outputs in (expected, got))
        for name, (found, passed) in compare_arrays(reference, other, error).items():
            group, layer = parse_name(name)
            yield TensorResult(inputs.kind, group, name, found, error, passed, inputs.prompt, inputs.step, layer)
        tokens, others = expected[contract.TOKENS][0], got[contract.TOKENS][0]  # (T,)
        literal = inputs.ids >= 0
        yield of_ids(contract.TOKENS, contract.TOKENS, float(np.mean(tokens[literal] != others[literal])), 0.0)
        pairs = zip(expected[contract.ARGMAX][0].tolist(), got[contract.ARGMAX][0].tolist(), strict=True)
        rows = zip(pairs, reference[contract.LOGITS][0], other[contract.LOGITS][0], strict=True)
        scale = float(np.abs(reference[contract.LOGITS]).max())
        gaps = [_logit_gap(pair, of_reference, of_other) for pair, of_reference, of_other in rows]
        widest = max(gaps) if all(map(math.isfinite, gaps)) else math.inf
        yield of_ids(contract.ARGMAX, contract.ARGMAX, widest / scale if widest else 0.0, gap)
        if summary_error is not None:
            yield of_ids(SUMMARIES, SUMMARIES, summary_error, SUMMARY_ERROR)
        if not literal.all():
            candidates, shared = self._count_shared(tokens, others)
            self._candidates, self._shared = self._candidates + candidates, self._shared + shared
            yield of_ids(CANDIDATES, contract.TOKENS, 1 - shared / candidates, 1 - self._limits.candidates)

    def _count_shared(self, tokens: IntArray, others: IntArray) -> tuple[int, int]:
        """Count the reference's candidates, and those that the same head of the other side has too."""
        candidates = shared = 0
        for depth in range(1, int(self._depths.max()) + 1):
            ours, theirs = (set(side[self._depths == depth].tolist()) for side in (tokens, others))
            candidates, shared = candidates + len(ours), shared + len(ours & theirs)
        return candidates, shared

    def _over_all_steps(self, worst: TensorResult) -> TensorResult:
        error = 1 - self._shared / self._candidates
        return replace(worst, error=error, passed=error <= worst.tolerance)


def _logit_gap(pair: tuple[int, int], reference: FloatArray, other: FloatArray) -> float:
    """Return the gap between the two sides' tokens, by the logits of the side where it is wider."""
    expected, got = pair
    if expected == got:
        return 0.0
    if not 0 <= got < len(other):
        return math.inf
    return max(float(reference[expected] - reference[got]), float(other[got] - other[expected]))
