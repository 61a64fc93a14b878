"""The steps of a reference: their inputs, and the rows that the model gives for them.

Shapes: n tokens of a step, P rows of its past, L layers, W elements of one token's keys of one layer, S what the heads
see of a token, V vocabulary, K heads, D tokens that the heads score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Rows:
    """Keys and values (L, n, W), hidden (n, S) and logits (n, V) of n tokens; what is not kept has no columns."""

    keys: FloatArray
    values: FloatArray
    hidden: FloatArray
    logits: FloatArray

    def take(self, rows: slice | IntArray) -> Rows:
        """Return those of some tokens."""
        return Rows(self.keys[:, rows], self.values[:, rows], self.hidden[rows], self.logits[rows])


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of the tokens before a step, (L, P, W) each."""

    keys: FloatArray
    values: FloatArray

    @property
    def length(self) -> int:
        """P."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, eq=False)
class ReferenceStep:
    """A step of literal tokens and what the model gives for it.

    ids, positions (n,), mask (n, n): node i sees node j of this step. expected: one row for each node. far: whether its
    tokens stand where no text has them, at far positions behind a few tokens: small errors may then grow large on their
    way through the layers, so a graph of fewer bits than fp32 is compared by the `first_layer` alone.
    """

    name: str
    ids: IntArray
    positions: IntArray
    mask: BoolArray
    past: Past
    expected: Rows
    far: bool = False

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def apart(self) -> bool:
        """Whether its nodes do not see each other."""
        return bool(np.array_equal(self.mask, np.eye(self.nodes, dtype=np.bool_)))

    @property
    def chained(self) -> bool:
        """Whether each node sees all before it."""
        return bool(np.array_equal(self.mask, np.tri(self.nodes, dtype=np.bool_)))

    def first_layer(self) -> ReferenceStep:
        """Return the same step with the first layer's keys and values alone to be compared."""
        rows = self.expected
        return replace(self, expected=Rows(rows.keys[:1], rows.values[:1], rows.hidden[:, :0], rows.logits[:, :0]))

    def part(self, start: int, end: int) -> ReferenceStep:
        """Return the step of some of its nodes, which must not see any of those left out."""
        rows = slice(start, end)
        return replace(
            self,
            ids=self.ids[rows],
            positions=self.positions[rows],
            mask=self.mask[rows, rows],
            expected=self.expected.take(rows),
        )


@dataclass(frozen=True, eq=False)
class ReferenceDraft:
    """What the heads propose behind `past`, whose last hidden row (S,) they see, for the root token.

    logits (K, D): of each head. tokens (D,): the token of each column.
    """

    root: int
    hidden: FloatArray
    past: Past
    logits: FloatArray
    tokens: IntArray


@dataclass(frozen=True, eq=False)
class Reference:
    """All that is compared with each graph."""

    steps: tuple[ReferenceStep, ...]
    draft: ReferenceDraft
