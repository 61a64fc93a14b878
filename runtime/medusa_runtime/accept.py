"""Acceptance rules: which path of a verified token tree is kept.

A rule is a pure function of the tree, the token at each node and what the decoder computed at each node. It returns
(path, next token): the accepted nodes from the root on, and the decoder's own choice behind the last of them.

Example: the tree has the paths [0], [0, 0] and [1], and the step returned::

    node    0 (root)   1    2    3
    tokens  42         7   19    8
    argmax   7        19    3    5

`greedy` starts at the root, where the decoder would write 7. Node 1 holds 7, so the walk goes there; the decoder's
next choice, 19, is at node 2; behind node 2 it is 3, and there is no further node. The result is ([0, 1, 2], 3): the
answer gains the tokens 7, 19 and 3. Had node 1 held another token, the result would be ([0], 7), which is plain
decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medusa_runtime.backends.base import BoolArray, FloatArray, IntArray
from medusa_runtime.errors import ArgumentError
from medusa_runtime.parameter_checks import as_float
from medusa_runtime.rows import RowReader

MIN_TEMPERATURE = 1e-6  # of `Typical`; logits divided by less soon overflow float32

Acceptance = tuple[list[int], int]  # accepted nodes from the root on, and the next token


class TokenTree(Protocol):
    """What a rule needs to know of a tree of T nodes; node 0 is the root."""

    @property
    def size(self) -> int:
        """Number of nodes T, including the root."""

    @property
    def depth(self) -> int:
        """Length of the longest path, 0 for the root alone."""

    @property
    def depths(self) -> IntArray:
        """Depth of each node, (T,) int32, 0 at the root."""

    @property
    def mask(self) -> BoolArray:
        """Attention mask, (T, T) bool: node i attends to node j where j is i itself or an ancestor of i."""

    @property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, T tuples of node indices in ascending order."""


AcceptRule = Callable[[TokenTree, Sequence[int], Sequence[int], RowReader], Acceptance]


def walk(tree: TokenTree, tokens: Sequence[int], choose: Callable[[int], int]) -> Acceptance:
    """Accept the longest path on which every token is the one that plain decoding would choose.

    Several nodes may hold the same token behind the same tokens, for example a head's candidate and a literal. The walk
    follows all of them, so that none of them hides the longer path behind another.

    Args:
        tree: The tree that was verified, of T nodes.
        tokens: Token id at each of the T nodes.
        choose: Returns the next token behind a node; called once for each token of the result, in order.

    Returns:
        The accepted nodes, the root first, and the token that was chosen behind the last of them.
    """
    children, paths = tree.children, [[0]]
    while True:
        token = choose(paths[0][-1])
        longer = [[*path, child] for path in paths for child in children[path[-1]] if tokens[child] == token]
        if not longer:
            return paths[0], token
        paths = longer


def greedy(
    tree: TokenTree,
    tokens: Sequence[int],
    argmax: Sequence[int],
    rows: RowReader | None = None,  # noqa: ARG001
) -> Acceptance:
    """Accept the path on which every token is the decoder's own greedy choice; lossless.

    Args:
        tree: The tree that was verified, of T nodes.
        tokens: Token id at each of the T nodes.
        argmax: Most likely next token at each of the T nodes.
        rows: Not read.

    Returns:
        The accepted nodes, the root first, and the decoder's choice behind the last of them.
    """
    return walk(tree, tokens, argmax.__getitem__)


@dataclass(frozen=True)
class Typical:
    """Typical acceptance: accepts the longest path whose every token is likely enough to the decoder. LOSSY by design.

    The rule of the Medusa paper (arXiv 2401.10774), section 2.3.1: a token of probability p is accepted where
    p > min(epsilon, delta * exp(-H)); H is the entropy of the decoder's distribution at the token's parent.

    Example: with the defaults, a distribution of entropy H = 2 gives the threshold min(0.09, 0.3 * exp(-2)) = 0.041.

    Args:
        epsilon: Hard threshold, a probability from 0 to 1.
        delta: Factor of the threshold that falls as the entropy rises; the default is the square root of epsilon's.
        temperature: Divides the logits before the softmax; the rule approaches `greedy` as it approaches 0.

    Raises:
        ArgumentError: A value is out of its range.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check every threshold and keep it as the float that was checked."""
        for name in ("epsilon", "delta", "temperature"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        if not 0 <= self.epsilon <= 1:
            raise ArgumentError(f"epsilon is {self.epsilon}, expected a probability, from 0 to 1")
        if not 0 <= self.delta < math.inf:
            raise ArgumentError(f"delta is {self.delta}, expected a finite number from 0 up")
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ArgumentError(
                f"temperature is {self.temperature}, expected a finite number from {MIN_TEMPERATURE:g} up; for "
                "temperature 0 use acceptance 'lossless'"
            )

    def __call__(self, tree: TokenTree, tokens: Sequence[int], argmax: Sequence[int], rows: RowReader, /) -> Acceptance:
        """Accept a path of one tree; arguments and result are those of `greedy`.

        The root is the decoder's own greedy choice and is always accepted. Among paths of the same length the more
        likely one wins, then the first.
        """
        best = max(self._paths(tree, tokens, rows), key=lambda found: (len(found[0]), found[1]))
        return best[0], argmax[best[0][-1]]

    def _paths(self, tree: TokenTree, tokens: Sequence[int], rows: RowReader) -> Iterator[tuple[list[int], float]]:
        """Yield every accepted path and its log-probability; logits are read only at nodes that a path has reached."""
        open_paths: list[tuple[list[int], float]] = [([0], 0.0)]
        while open_paths:
            path, log_probability = open_paths.pop()
            yield path, log_probability
            children = tree.children[path[-1]]
            if not children:
                continue
            log_p = log_softmax(rows(path[-1]) / self.temperature)
            p = np.exp(log_p)
            possible = p > 0  # a token with logit -inf adds nothing to the entropy, but 0 * -inf would be NaN
            entropy = -float(np.sum(p[possible] * log_p[possible]))
            threshold = min(self.epsilon, self.delta * math.exp(-entropy))
            for child in reversed(children):  # the list is a stack, so nodes are visited in ascending order
                if p[tokens[child]] > threshold:
                    open_paths.append(([*path, child], log_probability + float(log_p[tokens[child]])))


def log_softmax(logits: FloatArray) -> FloatArray:
    """Return the log-probabilities of one row of logits, (V,) -> (V,)."""
    shifted = logits - logits.max()
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return normalised


ACCEPT_RULES: dict[str, AcceptRule] = {"greedy": greedy, "typical": Typical()}
