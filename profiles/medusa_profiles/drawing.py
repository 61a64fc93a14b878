"""Draws a tree as text."""

from __future__ import annotations

import numpy as np

from medusa_profiles.profile import TreeProfile


def draw_tree(profile: TreeProfile) -> str:
    """Return a drawing of a tree: a summary line, then the rank, node index and head of each node.

    Leaves of one parent with consecutive ranks share a line (`2–9`), so a wide tree stays short.
    """
    per_depth = "+".join(map(str, np.bincount(profile.depths)))
    plural = "" if profile.size == 1 else "s"
    summary = f"{profile.name}: {profile.size} node{plural}, depth {profile.depth}, nodes per depth {per_depth}"
    rows = [("rank", "node", "head"), ("root", "0", "-"), *_rows(profile)]
    tree, node, head = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join([summary, *(f"{a:<{tree}}  {b:>{node}}  {c:>{head}}" for a, b, c in rows)])


def _rows(profile: TreeProfile) -> list[tuple[str, str, str]]:
    """Return (branch and rank, node, head) for each line below the root, depth first."""
    indents = [""] * profile.size  # text before the branches of a node's children
    rows = []
    for first, last in _runs(profile):
        parent = profile.parents[first]
        is_last = last == profile.children[parent][-1]
        indents[first] = indents[parent] + ("   " if is_last else "│  ")
        branch = indents[parent] + ("└─ " if is_last else "├─ ")
        ranks = _span(int(profile.ranks[first]), int(profile.ranks[last]))
        rows.append((branch + ranks, _span(first, last), str(profile.heads[first])))
    return rows


def _runs(profile: TreeProfile) -> list[tuple[int, int]]:
    """Return the nodes below the root as (first, last), with consecutive leaves of one parent in one range."""
    runs: list[tuple[int, int]] = []
    for node in range(1, profile.size):
        if runs and _joins(profile, node):
            runs[-1] = (runs[-1][0], node)
        else:
            runs.append((node, node))
    return runs


def _joins(profile: TreeProfile, node: int) -> bool:
    """Whether a node shares the line of the previous node: both are leaves and siblings, one rank apart."""
    before = node - 1
    return (
        not profile.children[before]
        and not profile.children[node]
        and bool(profile.parents[before] == profile.parents[node])
        and bool(profile.ranks[before] + 1 == profile.ranks[node])
    )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
