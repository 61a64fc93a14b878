"""The recording that graphs are compared with: the inputs of a few steps, and what the model computes for them.

Shapes: n tokens of a step, P rows of its past, L layers, W elements of a token's keys in a layer, E elements of the
heads' input for a token, V tokens of the vocabulary, K heads, D tokens that the heads score.
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
    """Keys and values (L, n, W), hidden states (n, E) and logits (n, V) of n tokens; parts not kept have no columns."""

    keys: FloatArray
    values: FloatArray
    hidden: FloatArray
    logits: FloatArray

    def take(self, rows: slice | IntArray) -> Rows:
        """Return the rows of some of the tokens."""
        return Rows(self.keys[:, rows], self.values[:, rows], self.hidden[rows], self.logits[rows])


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of the tokens before a step, (L, P, W) each."""

    keys: FloatArray
    values: FloatArray

    @property
    def length(self) -> int:
        """Number of rows, P."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """A step of given tokens, and what the model computes for it.

    Attributes:
        ids: Token ids, (n,).
        positions: Positions, (n,).
        mask: (n, n); whether node i attends to node j of this step.
        past: Keys and values of the tokens before the step.
        expected: What the model computes, one row for each node.
        far: Whether the tokens are at positions far from the few tokens of their past, as in no real text. Small errors
            may grow there from layer to layer, so graphs of fewer bits than fp32 are compared in the first layer only.
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
        """Number of nodes, n."""
        return len(self.ids)

    @property
    def independent(self) -> bool:
        """Whether no node attends to another one."""
        return bool(np.array_equal(self.mask, np.eye(self.nodes, dtype=np.bool_)))

    @property
    def causal(self) -> bool:
        """Whether each node attends to all nodes before it."""
        return bool(np.array_equal(self.mask, np.tri(self.nodes, dtype=np.bool_)))

    def first_layer(self) -> RecordedStep:
        """Return the same step, of which only the keys and values of the first layer are compared."""
        rows = self.expected
        return replace(self, expected=Rows(rows.keys[:1], rows.values[:1], rows.hidden[:, :0], rows.logits[:, :0]))

    def part(self, start: int, end: int) -> RecordedStep:
        """Return the step of the nodes from `start` to `end`, which must not attend to any other node."""
        rows = slice(start, end)
        return replace(
            self,
            ids=self.ids[rows],
            positions=self.positions[rows],
            mask=self.mask[rows, rows],
            expected=self.expected.take(rows),
        )


@dataclass(frozen=True, eq=False)
class RecordedDraft:
    """What the heads propose for a root token.

    Attributes:
        root: The root token, which follows `past`.
        hidden: Input of the heads for the last token of `past`, (E,).
        past: Keys and values of the tokens before the root.
        logits: Logits of each head, (K, D).
        tokens: The token of each column of `logits`, (D,).
    """

    root: int
    hidden: FloatArray
    past: Past
    logits: FloatArray
    tokens: IntArray


@dataclass(frozen=True, eq=False)
class Recording:
    """Everything that each graph is compared with; without heads there is no draft."""

    steps: tuple[RecordedStep, ...]
    draft: RecordedDraft | None
