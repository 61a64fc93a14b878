"""The precisions that a decoder's weights can have; between the products activations are fp32 in all of them."""

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


# The heads only guess: whatever they are kept in, the decoder verifies, so few bits cost guesses and never tokens. 4
# bits in place of fp32: 0 to 0.7% fewer tokens a step at 2 to 6 nodes on twelve training prompts, 3 to 4% on the six of
# `make demo`; 2 ms less of a step in fp32. (8 bits: within 0.3%, 1.6 ms less.)
DRAFT = WeightFormat(4, 32)

# int8: blocks of 64 are as near to fp32 as blocks of 32 (0.976 and 0.977 of the argmaxes, 128: 0.959), and a step of
# four rows is a tenth faster where the processor has VNNI (AVX2: no difference). int4: those of 128 agree less (0.738,
# 32: 0.766), and with blocks of 64 too one row alone has other bits than among others, so a tree would part from plain.
INT8 = WeightFormat(8, 64)
FORMATS: dict[str, WeightFormat | None] = {"fp32": None, "int8": INT8, "w8a8": INT8, "int4": WeightFormat(4, 32)}
PRECISIONS = tuple(FORMATS)

# Precisions in which products of what norms and attention give are of whole numbers, activations under fixed scales
# (`graph.integers`); FORMATS says what the other products are in.
FIXED_SCALES = frozenset({"w8a8"})

# Nodes of the tree with the most tokens per millisecond on two cores (AVX-512 with VNNI), measured on training prompts;
# 1 is plain decoding, which no tree beats in int4: its second row costs a third of a step, the heads a sixth.
BEST_NODES = {"fp32": 6, "int8": 2, "w8a8": 2, "int4": 1}


def default_profile(precision: str, trees: Iterable[TreeProfile]) -> str:
    """The name of the tree to take where none is named: the largest of BEST_NODES nodes at most, fitted ones first."""
    fitting = [tree for tree in trees if tree.size <= BEST_NODES[precision]]
    best = max(fitting, key=lambda tree: (tree.size, tree.name == f"tree-{tree.size}"), default=None)
    return PLAIN if best is None else best.name
