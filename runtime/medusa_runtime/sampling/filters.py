"""Which tokens a draw considers: min_p, top_k, then top_p, with the definitions of vLLM and transformers.

Tokens are ranked by descending logits, equal ones by ascending ids, and every filter keeps the first of them:

- min_p keeps the tokens whose probability is at least min_p times the largest: l_i ≥ max l + T · log(min_p).
- top_k keeps the tokens whose logit is at least the k-th largest; of equal logits at the border all are kept.
- top_p keeps the fewest first tokens whose mass reaches top_p times the mass of all that min_p and top_k left; at
  least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.sampling.noise import DoubleArray, clamped, round_down, weights
from medusa_runtime.sampling.ranking import kth_largest
from medusa_runtime.sampling.scratch import thread_scratch
from medusa_runtime.sampling_params import SamplingParams

IdArray = NDArray[np.intp]

LARGE = 16_384  # candidates of a nucleus beyond which a token is drawn before they are ranked
FEW = 1024  # tokens that are ranked all
_MARGIN = 1e-4  # relative error of a mass that is summed in float32


@dataclass(frozen=True)
class Filters:
    """The filters of one request, above temperature 0.

    Args:
        temperature: T, above 0.
        min_p: From 0 to 1; 0 keeps all.
        top_k: From 0 up; 0 keeps all.
        top_p: Above 0 and up to 1; 1 keeps all.
    """

    temperature: float
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, params: SamplingParams) -> Filters:
        """Return the filters of a request."""
        return cls(clamped(params.temperature), params.min_p, params.top_k, params.top_p)

    @property
    def active(self) -> bool:
        """Whether a token may be left out."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1

    def least_logit(self, largest: float) -> float:
        """Return the smallest float32 logit that min_p keeps, given the largest logit; -inf without min_p."""
        if self.min_p == 0:
            return -math.inf
        return -float(round_down(-(largest + self.temperature * math.log(self.min_p))))

    def masses(self, ranked: FloatArray) -> DoubleArray:
        """Return the cumulative masses exp((l - max l) / T) of logits in descending order, (n,) float64."""
        shifted = (ranked.astype(np.float64) - float(ranked[0])) / self.temperature
        return np.cumsum(np.exp(shifted))

    def left(self, logits: FloatArray) -> IdArray | None:
        """Return the ids that min_p and top_k keep, ascending; None if none is left out.

        Args:
            logits: (V,) logits after the processors; at least one must be above -inf.
        """
        least = self.least_logit(float(logits.max()))
        if 0 < self.top_k < len(logits):
            least = max(least, kth_largest(logits, self.top_k))
        return np.flatnonzero(logits >= np.float32(least)) if least > -math.inf else None

    def kept(self, logits: FloatArray) -> IdArray | None:
        """Return the ids that all filters keep, ascending; arguments and result are those of `left`."""
        ids = self.left(logits)
        if self.top_p == 1:
            return ids
        inside = Nucleus(logits if ids is None else logits[ids], self).indices()
        return inside if ids is None else ids[inside]


class Nucleus:
    """The tokens that top_p keeps.

    Args:
        logits: (n,) logits of the tokens that the other filters left, in the order of their ids.
        filters: The filters.
    """

    def __init__(self, logits: FloatArray, filters: Filters) -> None:
        n, self._logits, self._filters = len(logits), logits, filters
        if n <= FEW:
            self._candidates = np.arange(n)
            return
        largest, temperature = float(logits.max()), filters.temperature
        self._weights = weights(logits, temperature, largest, thread_scratch(n).weights[:n])
        self._total = float(self._weights.sum(dtype=np.float64))
        # The tokens below this logit together have half of the mass that top_p leaves out, at most.
        least = largest + temperature * math.log((1 - filters.top_p) * self._total / (2 * n))
        self._candidates = np.flatnonzero(logits >= -round_down(-least))

    @property
    def is_large(self) -> bool:
        """Whether so many tokens may be in it that drawing from all is faster than finding out which are."""
        return len(self._candidates) > LARGE

    def surely_has(self, index: int) -> bool:
        """Return whether a token is in it for certain: the tokens above it and its equals before it have less mass.

        Args:
            index: Index of the token among the logits.
        """
        before = self._logits > self._logits[index]
        before[:index] |= self._logits[:index] == self._logits[index]
        mass = float(np.dot(self._weights, before.astype(np.float32)))
        return mass < self._filters.top_p * self._total * (1 - _MARGIN)

    def indices(self) -> IdArray:
        """Return the indices of its tokens among the logits, ascending."""
        logits = self._logits[self._candidates]
        behind = 0.0  # mass of the tokens that are no candidates
        if len(logits) < len(self._logits):
            behind = max(0.0, self._total - float(self._weights[self._candidates].sum(dtype=np.float64)))
        ranked = np.sort(logits)[::-1]
        masses = self._filters.masses(ranked)
        count = nucleus_size(masses, self._filters.top_p * (float(masses[-1]) + behind))
        last = ranked[count - 1]
        inside = logits > last
        border = np.flatnonzero(logits == last)[: count - int(inside.sum())]
        inside[border] = True
        kept: IdArray = self._candidates[inside]
        return kept


def nucleus_size(masses: DoubleArray, wanted: float) -> int:
    """Return how many of the first tokens reach a mass; all if they do not."""
    return min(int(np.searchsorted(masses, wanted)) + 1, len(masses))
