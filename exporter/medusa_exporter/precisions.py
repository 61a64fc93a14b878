"""The precisions that a graph's weights can have; activations are fp32 in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile
from medusa_runtime.facts import PLAIN


@dataclass(frozen=True)
class WeightFormat:
    """How weights are kept: bits each, and how many neighbours in a column share a scale; symmetric around zero."""

    bits: int
    block: int


@dataclass(frozen=True)
class Weights:
    """How a graph keeps the weights of the decoder, and of the draft, that is the heads; None is fp32.

    The draft only guesses: whatever it is kept in, the decoder verifies, so its format costs guesses, never tokens.
    """

    decoder: WeightFormat | None
    draft: WeightFormat | None


# Blocks of 64 and 128 were no faster than 32 on AVX2 and agree less with fp32 (8 bits: 0.977, 0.976, 0.959 of the
# argmaxes; 4 bits, 32 and 128: 0.766, 0.738).
INT8, INT4 = WeightFormat(8, 32), WeightFormat(4, 32)
FORMATS = {"fp32": Weights(None, INT8), "int8": Weights(INT8, INT8), "int4": Weights(INT4, INT4)}
PRECISIONS = tuple(FORMATS)

# Nodes of the tree with the most tokens per millisecond on two cores (AVX2), by the fitted trees' tokens a step on
# conversations kept back from training and the time of steps of so many rows.
BEST_NODES = {"fp32": 6, "int8": 2, "int4": 2}


def default_profile(precision: str, trees: Iterable[TreeProfile]) -> str:
    """The name of the tree to take where none is named: the largest of BEST_NODES nodes at most, fitted ones first."""
    fitting = [tree for tree in trees if tree.size <= BEST_NODES[precision]]
    best = max(fitting, key=lambda tree: (tree.size, tree.name == f"tree-{tree.size}"), default=None)
    return PLAIN if best is None else best.name
