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
from medusa_runtime.sampling.noise import DoubleArray, clamped, weights
from medusa_runtime.sampling.ranking import kth_largest
from medusa_runtime.sampling.scratch import thread_scratch
from medusa_runtime.sampling_params import SamplingParams

IdArray = NDArray[np.intp]


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
        return _round_up(largest + self.temperature * math.log(self.min_p)) if self.min_p > 0 else -math.inf

    def masses(self, ranked: FloatArray) -> DoubleArray:
        """Return the cumulative masses exp((l - max l) / T) of logits in descending order, (n,) float64."""
        shifted = (ranked.astype(np.float64) - float(ranked[0])) / self.temperature
        return np.cumsum(np.exp(shifted))

    def kept(self, logits: FloatArray) -> IdArray | None:
        """Return the ids that the filters keep, ascending; None if none is left out.

        Args:
            logits: (V,) logits after the processors; at least one must be above -inf.
        """
        largest = float(logits.max())
        least = self.least_logit(largest)
        if 0 < self.top_k < len(logits):
            least = max(least, kth_largest(logits, self.top_k))
        if least > -math.inf:
            ids = np.flatnonzero(logits >= np.float32(least))
            return ids if self.top_p == 1 else ids[self._nucleus(logits[ids], 0.0)]
        if self.top_p == 1:
            return None
        ratios = weights(logits, self.temperature, thread_scratch(len(logits)).weights[: len(logits)])
        total = float(ratios.sum(dtype=np.float64))
        # The tokens below this logit together have half of the mass that top_p leaves out, at most.
        least = largest + self.temperature * math.log((1 - self.top_p) * total / (2 * len(logits)))
        ids = np.flatnonzero(logits >= np.float32(_round_up(least)))
        behind = max(0.0, total - float(ratios[ids].sum(dtype=np.float64)))
        return ids[self._nucleus(logits[ids], behind)]

    def _nucleus(self, logits: FloatArray, behind: float) -> IdArray:
        """Return the indices, ascending, of those logits that top_p keeps.

        Args:
            logits: (n,) in the order of their ids.
            behind: The mass of all further tokens, which have smaller logits, relative to the largest.
        """
        ranked = np.sort(logits)[::-1]
        masses = self.masses(ranked)
        count = nucleus_size(masses, self.top_p * (float(masses[-1]) + behind))
        last = ranked[count - 1]
        inside = logits > last
        border = np.flatnonzero(logits == last)[: count - int(inside.sum())]
        inside[border] = True
        return np.flatnonzero(inside)


def nucleus_size(masses: DoubleArray, wanted: float) -> int:
    """Return how many of the first tokens reach a mass; all if they do not."""
    return min(int(np.searchsorted(masses, wanted)) + 1, len(masses))


def _round_up(value: float) -> float:
    """Return the smallest float32 that is at least `value`, so that float32 logits compare with it exactly."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return float(rounded if rounded >= value else np.nextafter(rounded, np.float32(np.inf)))
