"""What heads are, by the names and shapes of their weights: how many, how deep, conditioned on what. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.layouts import MAP_NAME
from medusa_exporter.heads.stored import Shape, StoredHeads, find_heads, heads_files

__all__ = ["HeadFacts", "HeadsError", "heads_files", "layout_facts", "read_head_facts", "stored_facts"]

_LINEAR = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d+)\.\d+\.weight")


@dataclass(frozen=True)
class HeadFacts:
    """What names and shapes say.

    own_lm_head_size: rows of each head's own lm_head, or None when the decoder's is shared. draft_vocabulary: how many
    tokens the heads score, or None when they score all.
    """

    heads: int
    layers: int
    conditioning: Literal["none", "root"]
    hidden_size: int
    own_lm_head_size: int | None
    draft_vocabulary: int | None = None


def read_head_facts(source: str | Path) -> tuple[int, int, str]:
    """Return (heads, layers per head, conditioning) of a folder or hub name; raise HeadsError for what is none."""
    facts = stored_facts(find_heads(source))
    return facts.heads, facts.layers, facts.conditioning


def stored_facts(stored: StoredHeads) -> HeadFacts:
    """Derive the facts of heads as they lie on disk; raise HeadsError as `layout_facts` does."""
    return layout_facts(stored.shapes, stored.where, stored.names)


def layout_facts(shapes: Mapping[str, Shape], where: str, names: Mapping[str, str] | None = None) -> HeadFacts:
    """Derive the facts from shapes by the authors' names (see `layouts`).

    where, names: the file, and what it calls each weight, for messages. Raises HeadsError for gaps in the numbering,
    heads of different depth, missing biases and shapes that do not fit together.
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
    conditioning: Literal["none", "root"] = "root" if first == 2 * hidden_size else "none"
    expected: dict[str, Shape] = {}
    for head in range(heads):
        for layer in range(layers):
            width = first if layer == 0 and conditioning == "root" else hidden_size
            expected[f"{head}.{layer}.linear.weight"] = (hidden_size, width)
            expected[f"{head}.{layer}.linear.bias"] = (hidden_size,)
    own_size = None
    if lm_heads:
        own_size, _ = _sizes(shapes, f"0.{layers}.weight", where, names)
        expected |= {f"{head}.{layers}.weight": (own_size, hidden_size) for head in range(heads)}
    draft_vocabulary = None
    if MAP_NAME in shapes:
        draft_vocabulary = _map_size(shapes[MAP_NAME], own_size, where)
        expected[MAP_NAME] = (draft_vocabulary,)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise HeadsError(
                f"{where}: {names.get(name, name)} has shape {shapes.get(name, 'missing')}, expected "
                f"{expected.get(name, 'none')} ({heads} heads of {layers} layers, hidden size {hidden_size}); "
                "damaged or of another layout"
            )
    return HeadFacts(heads, layers, conditioning, hidden_size, own_size, draft_vocabulary)


def _map_size(shape: Shape, own_size: int | None, where: str) -> int:
    if len(shape) != 1 or shape[0] < 1:
        raise HeadsError(f"{where}: {MAP_NAME} has shape {shape}, expected (D,): one token id for each lm_head row")
    if own_size is not None and own_size < shape[0]:
        raise HeadsError(
            f"{where}: lm_heads of {own_size} rows under a {MAP_NAME} of {shape[0]} tokens; expected a row for each; "
            "damaged or of another layout"
        )
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
