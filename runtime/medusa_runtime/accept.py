"""Which path of a verified tree is kept: pure functions of the tree, its tokens and what the decoder says of them.

Every rule returns (path, next): the kept nodes from the root on, and the decoder's own token behind the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from medusa_profiles.profile import TreeProfile

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.errors import MedusaError

MIN_TEMPERATURE = 1e-6  # of a typical rule: below, logits divided by it soon leave float32

Acceptance = tuple[list[int], int]


class LogitsReader(Protocol):
    """Reads one row of logits, (V,) float32, only when a rule needs it."""

    def __call__(self, row: int, /) -> FloatArray:
        """Return the logits at node `row`."""


AcceptRule = Callable[[TreeProfile, Sequence[int], Sequence[int], LogitsReader], Acceptance]


def greedy(
    tree: TreeProfile,
    tokens: Sequence[int],
    argmax: Sequence[int],
    logits: LogitsReader | None = None,  # noqa: ARG001
) -> Acceptance:
    """Keep the path whose every token is the decoder's own greedy choice: lossless.

    tokens: the token at each of T nodes; argmax: the greedy next token at each. `logits` is not read.
    """
    path, node = [0], 0
    while True:
        for child in tree.children[node]:
            if tokens[child] == argmax[node]:
                path.append(child)
                node = child
                break
        else:
            return path, argmax[node]


@dataclass(frozen=True)
class Typical:
    """Keeps the longest path whose every token the decoder finds likely enough: LOSSY, by design.

    Medusa paper (arXiv 2401.10774) section 2.3.1: a token is accepted where p > min(epsilon, delta * exp(-H)), p and
    the entropy H being those of the decoder's distribution at its parent. epsilon: the hard threshold, a probability.
    delta: the factor of the threshold that falls as the entropy rises; by default the root of epsilon's default.
    temperature: divides the logits first; towards 0 the rule becomes `greedy`. Raises MedusaError for other values.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise MedusaError(f"epsilon is {self.epsilon}, expected a probability, from 0 to 1")
        if not 0 <= self.delta < math.inf:
            raise MedusaError(f"delta is {self.delta}, expected a finite number from 0 up")
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise MedusaError(
                f"temperature is {self.temperature}, expected a finite number from {MIN_TEMPERATURE:g} up; for "
                "temperature 0 take the rule 'greedy'"
            )

    def __call__(
        self, tree: TreeProfile, tokens: Sequence[int], argmax: Sequence[int], logits: LogitsReader, /
    ) -> Acceptance:
        """Judge one tree; arguments as in `greedy`.

        The root, drawn greedily by the decoder itself, is always accepted; among paths of one length the likelier
        wins, then the first.
        """
        best = max(self._paths(tree, tokens, logits), key=lambda found: (len(found[0]), found[1]))
        return best[0], argmax[best[0][-1]]

    def _paths(
        self, tree: TreeProfile, tokens: Sequence[int], logits: LogitsReader
    ) -> Iterator[tuple[list[int], float]]:
        """Give every accepted path with its log-probability; rows are read only where a path has arrived."""
        open_paths: list[tuple[list[int], float]] = [([0], 0.0)]
        while open_paths:
            path, log_probability = open_paths.pop()
            yield path, log_probability
            children = tree.children[path[-1]]
            if not children:
                continue
            log_p = log_softmax(logits(path[-1]) / self.temperature)
            p = np.exp(log_p)
            possible = p > 0  # a token of logit -inf adds nothing to the entropy; 0 * -inf would be NaN
            entropy = -float(np.sum(p[possible] * log_p[possible]))
            threshold = min(self.epsilon, self.delta * math.exp(-entropy))
            for child in reversed(children):  # the last one put down is taken up first: nodes come in rising order
                if p[tokens[child]] > threshold:
                    open_paths.append(([*path, child], log_probability + float(log_p[tokens[child]])))


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities of one row, (V,) -> (V,)."""
    shifted = logits - logits.max()
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return normalised


ACCEPT_RULES: dict[str, AcceptRule] = {"greedy": greedy, "typical": Typical()}
