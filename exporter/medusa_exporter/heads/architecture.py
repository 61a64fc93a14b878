"""Derives the architecture of heads from the names and shapes of their weights, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.headers import Shape, StoredHeads, find_heads, heads_files
from medusa_exporter.heads.layouts import MAP_NAME, TAPS_NAME, TRUNK_NAMES

__all__ = [
    "HeadArchitecture",
    "expected_shapes",
    "heads_files",
    "infer_architecture",
    "read_architecture",
    "stored_architecture",
]

_LINEAR = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d+)\.\d+\.weight")


@dataclass(frozen=True)
class HeadArchitecture:
    """How many heads there are and what they consist of.

    Attributes:
        heads: Number of heads, K.
        layers: ResBlocks per head.
        conditioning: "root" if the heads see the embedding of the token that the decoder has just chosen.
        hidden_size: Hidden size of the decoder, H.
        own_lm_head_size: Rows of each head's own lm_head, `None` if the heads share the decoder's.
        draft_vocabulary: How many tokens the heads score, `None` for the whole vocabulary.
        taps: How many decoder layers the heads tap.
        trunk: Width of the gated block that all heads share, 0 for none.
    """

    heads: int
    layers: int
    conditioning: Literal["none", "root"]
    hidden_size: int
    own_lm_head_size: int | None
    draft_vocabulary: int | None = None
    taps: int = 0
    trunk: int = 0


def read_architecture(source: str | Path) -> HeadArchitecture:
    """Read the architecture of the heads in a folder or hub repository; raise HeadsError where there are none."""
    return stored_architecture(find_heads(source))


def stored_architecture(stored: StoredHeads) -> HeadArchitecture:
    """Derive the architecture of heads that were found; raise HeadsError as `infer_architecture` does."""
    return infer_architecture(stored.shapes, stored.where, stored.names)


def infer_architecture(
    shapes: Mapping[str, Shape], where: str, names: Mapping[str, str] | None = None
) -> HeadArchitecture:
    """Derive the architecture from the shapes of all weights.

    Args:
        shapes: Shapes by the Medusa authors' names, see `layouts`.
        where: The file, for messages.
        names: Names of the weights in the file by the authors' names, for messages.

    Raises:
        HeadsError: Heads are missing in the numbering or have different depths, or shapes do not fit together.
    """
    names = names or {}
    linears = [(int(match[1]), int(match[2])) for match in map(_LINEAR.fullmatch, shapes) if match]
    lm_heads = [int(match[1]) for match in map(_LM_HEAD.fullmatch, shapes) if match]
    heads = _count({head for head, _ in linears} | set(lm_heads), where)
    depths = [0] * heads
    for head, layer in linears:
        depths[head] = max(depths[head], layer + 1)
    if len(set(depths)) != 1 or depths[0] == 0:
        raise HeadsError(f"{where}: heads of {depths} layers; expected one depth of at least 1 for all heads")
    layers = depths[0]
    hidden_size, first = _sizes(shapes, "0.0.linear.weight", where, names)
    own_size = _sizes(shapes, f"0.{layers}.weight", where, names)[0] if lm_heads else None
    draft_vocabulary = _map_size(shapes[MAP_NAME], own_size, where) if MAP_NAME in shapes else None
    taps = _length(shapes[TAPS_NAME], TAPS_NAME, where) if TAPS_NAME in shapes else 0
    trunk, seen = 0, first
    if any(name in shapes for name in TRUNK_NAMES):
        trunk, seen = _sizes(shapes, TRUNK_NAMES[0], where, names)
    conditioning: Literal["none", "root"] = "root" if seen == (2 + taps) * hidden_size else "none"
    facts = HeadArchitecture(heads, layers, conditioning, hidden_size, own_size, draft_vocabulary, taps, trunk)
    expected = expected_shapes(facts)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise HeadsError(
                f"{where}: {names.get(name, name)} has shape {shapes.get(name, 'missing')}, expected "
                f"{expected.get(name, 'none')} ({heads} heads of {layers} layers, hidden size {hidden_size}); "
                "damaged or of another layout"
            )
    return facts


def expected_shapes(facts: HeadArchitecture) -> dict[str, Shape]:
    """Return the shapes of all weights by the authors' names: the inverse of `infer_architecture`."""
    H = facts.hidden_size
    seen = H * (1 + facts.taps + (facts.conditioning == "root"))  # columns of the first weight that is applied
    expected: dict[str, Shape] = {}
    for head in range(facts.heads):
        for layer in range(facts.layers):
            expected[f"{head}.{layer}.linear.weight"] = (H, H if layer or facts.trunk else seen)
            expected[f"{head}.{layer}.linear.bias"] = (H,)
        if facts.own_lm_head_size is not None:
            expected[f"{head}.{facts.layers}.weight"] = (facts.own_lm_head_size, H)
    if facts.trunk:
        gate, up, down = TRUNK_NAMES
        expected |= {gate: (facts.trunk, seen), up: (facts.trunk, seen), down: (H, facts.trunk)}
    if facts.draft_vocabulary is not None:
        expected[MAP_NAME] = (facts.draft_vocabulary,)
    if facts.taps:
        expected[TAPS_NAME] = (facts.taps,)
    return expected


def parameter_count(facts: HeadArchitecture) -> int:
    """Return how many values the weights of these heads have."""
    return sum(math.prod(shape) for shape in expected_shapes(facts).values())


def _map_size(shape: Shape, own_size: int | None, where: str) -> int:
    size = _length(shape, MAP_NAME, where)
    if own_size is not None and own_size < size:
        raise HeadsError(
            f"{where}: lm_heads of {own_size} rows under a {MAP_NAME} of {size} tokens; expected a row for each; "
            "damaged or of another layout"
        )
    return size


def _length(shape: Shape, name: str, where: str) -> int:
    if len(shape) != 1 or shape[0] < 1:
        raise HeadsError(f"{where}: {name} has shape {shape}, expected one size of at least 1; damaged")
    return shape[0]


def _sizes(shapes: Mapping[str, Shape], name: str, where: str, names: Mapping[str, str]) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2 or min(shape) < 1:
        got = f"{names.get(name, name)} has shape {shapes.get(name, 'missing')}"
        raise HeadsError(f"{where}: {got}, expected two sizes of at least 1; damaged or of another layout")
    return shape[0], shape[1]


def _count(numbers: set[int], where: str) -> int:
    if numbers != set(range(len(numbers))):
        raise HeadsError(f"{where}: heads are numbered {sorted(numbers)}; expected 0, 1, 2 … without a gap")
    return len(numbers)
