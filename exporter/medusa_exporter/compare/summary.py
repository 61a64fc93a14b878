"""Two sides' outputs, step by step: each tensor's error, and the worst of every group and kind of step."""

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
from medusa_exporter.compare.steps import KINDS, Kind, ReferenceStep, StepInputs
from medusa_exporter.compare.tensors import float_tensors, parse_name
from medusa_exporter.compare.tolerances import Tolerance

CANDIDATES = "candidates"
GROUPS = (contract.TOKENS, CANDIDATES, contract.ARGMAX, "logits", "hidden", "taps", "keys", "values")


@dataclass(frozen=True)
class TensorResult:
    """How far one tensor of one step is from the reference's.

    error, tolerance: shares of the largest magnitude in the reference's tensor; of argmax the widest gap between the
    two sides' tokens, as a share of the logits' largest magnitude; of tokens and candidates the share that differs.
    prompt, step, layer: as in `steps.StepInputs`; layer None for what is not of one layer.
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
        """The worse of two findings has the greater one."""
        error = math.inf if math.isnan(self.error) else self.error
        return not self.passed, error / self.tolerance if self.tolerance else error

    @property
    def where(self) -> str:
        """Prompt, step and layer, in words."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"prompt {self.prompt}, step {self.step}{layer}"


class ComparisonSummary:
    """What comparing has found so far. `steps` counts those compared."""

    def __init__(self, model: ModelFacts, heads: HeadFacts, tree: TreeProfile, limits: Tolerance) -> None:
        """Nothing is compared yet."""
        self._hidden_size, self._taps = model.hidden_size, heads.taps
        self._depths, self._limits = tree.depths, limits
        self._worst: dict[tuple[Kind, str], TensorResult] = {}
        self._drafted = self._shared = 0  # candidates of the reference, and those that the other side has too
        self.steps = 0
        self.first: TensorResult | None = None  # beyond its tolerance, in the order of steps, and of layers in a step

    def add(self, taken: ReferenceStep, got: StepOutputs) -> None:
        """Compare one step. Raises MedusaError where names or shapes differ."""
        self.steps += 1
        for finding in self._findings(taken.place, taken.outputs, got):
            key = finding.kind, finding.group
            if key not in self._worst or finding.severity > self._worst[key].severity:
                self._worst[key] = finding
            if self.first is None and not finding.passed and finding.group != CANDIDATES:
                self.first = finding

    def rows(self) -> list[TensorResult]:
        """Return the worst finding of each kind of step and group; of candidates the share over all steps."""
        found = [self._worst[kind, group] for kind in KINDS for group in GROUPS if (kind, group) in self._worst]
        return [self._over_all(one) if one.group == CANDIDATES else one for one in found]

    def worst(self) -> TensorResult | None:
        """Return the finding furthest beyond its tolerance; None where all are within."""
        return max((one for one in self.rows() if not one.passed), key=lambda one: one.severity, default=None)

    def _findings(self, place: StepInputs, expected: StepOutputs, got: StepOutputs) -> Iterator[TensorResult]:
        def of_ids(group: str, name: str, error: float, tolerance: float) -> TensorResult:
            passed = error <= tolerance
            return TensorResult(place.kind, group, name, error, tolerance, passed, place.prompt, place.number)

        error, gap = self._limits.error, self._limits.gap
        reference, other = (float_tensors(outputs, self._hidden_size, self._taps) for outputs in (expected, got))
        for name, (found, passed) in compare_arrays(reference, other, error).items():
            group, layer = parse_name(name)
            yield TensorResult(place.kind, group, name, found, error, passed, place.prompt, place.number, layer)
        tokens, others = expected[contract.TOKENS][0], got[contract.TOKENS][0]  # (T,)
        literal = place.ids >= 0
        yield of_ids(contract.TOKENS, contract.TOKENS, float(np.mean(tokens[literal] != others[literal])), 0.0)
        pairs = zip(expected[contract.ARGMAX][0].tolist(), got[contract.ARGMAX][0].tolist(), strict=True)
        rows = zip(pairs, reference[contract.LOGITS][0], other[contract.LOGITS][0], strict=True)
        scale = float(np.abs(reference[contract.LOGITS]).max())
        gaps = [_gap(pair, of_reference, of_other) for pair, of_reference, of_other in rows]
        widest = max(gaps) if all(map(math.isfinite, gaps)) else math.inf
        yield of_ids(contract.ARGMAX, contract.ARGMAX, widest / scale if widest else 0.0, gap)
        if not literal.all():
            drafted, shared = self._candidates(tokens, others)
            self._drafted, self._shared = self._drafted + drafted, self._shared + shared
            yield of_ids(CANDIDATES, contract.TOKENS, 1 - shared / drafted, 1 - self._limits.candidates)

    def _candidates(self, tokens: IntArray, others: IntArray) -> tuple[int, int]:
        """Count the reference's candidates, head by head, and those of them that the other side's head has too."""
        drafted = shared = 0
        for depth in range(1, int(self._depths.max()) + 1):
            ours, theirs = (set(side[self._depths == depth].tolist()) for side in (tokens, others))
            drafted, shared = drafted + len(ours), shared + len(ours & theirs)
        return drafted, shared

    def _over_all(self, worst: TensorResult) -> TensorResult:
        error = 1 - self._shared / self._drafted
        return replace(worst, error=error, passed=error <= worst.tolerance)


def _gap(pair: tuple[int, int], reference: FloatArray, other: FloatArray) -> float:
    """How far apart the two sides' tokens are, in the logits of the side that finds them further apart."""
    expected, got = pair
    if expected == got:
        return 0.0
    if not 0 <= got < len(other):
        return math.inf
    return max(float(reference[expected] - reference[got]), float(other[got] - other[expected]))
