"""The best tree for measured head accuracies, and what a tree is worth on them.

Both work on `hits`, (S, K) integers: hits[s, k] is the rank (0-based) at which head k held the true token at sample s,
or -1 where that rank was beyond what was kept. A node is accepted at a sample where its path equals the first ranks of
that row, so a tree's expected tokens per step are 1 (the root's own) + the sum of its nodes' frequencies. A prefix of
ranks is at least as frequent as any continuation of it, so the most frequent prefixes always form a tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_profiles.profile import Path, ProfileError, TreeProfile

Hits = npt.NDArray[np.integer[Any]]


def best_tree(hits: Hits, nodes: int, name: str, source: str = "") -> TreeProfile:
    """Return the tree of `nodes` nodes, root included, with the most expected tokens per step on `hits` (S, K).

    Ties go to the shorter path, then to the lexicographically smaller one, so the result is deterministic.
    Raises ProfileError if `hits` has another shape or type, or holds fewer distinct rank prefixes than nodes - 1.
    """
    _check_hits(hits)
    if nodes < 1:
        raise ProfileError(f"a tree has at least 1 node, its root; got nodes = {nodes}")
    counts = _prefix_counts(hits, nodes - 1)
    if len(counts) < nodes - 1:
        raise ProfileError(
            f"a tree of {nodes} nodes needs {nodes - 1} distinct rank prefixes but the {len(hits)} samples hold only "
            f"{len(counts)}; measure more samples, keep more ranks or ask for at most {len(counts) + 1} nodes"
        )
    best = sorted(counts, key=lambda path: (-counts[path], len(path), path))[: nodes - 1]
    return TreeProfile(name, tuple(best), source)


def expected_tokens(profile: TreeProfile, hits: Hits) -> float:
    """Return the mean tokens per step (1 or more) that greedy verification of the tree keeps on `hits` (S, K).

    Raises ProfileError if `hits` has another shape or type, is empty, or has fewer heads than the tree is deep.
    """
    _check_hits(hits)
    if len(hits) == 0:
        raise ProfileError("expected tokens need at least one sample, got none")
    if profile.depth > hits.shape[1]:
        raise ProfileError(f"tree '{profile.name}' is {profile.depth} deep but the samples cover {hits.shape[1]} heads")
    accepted = sum(int((hits[:, : len(path)] == path).all(axis=1).sum()) for path in profile.paths)
    return 1 + accepted / len(hits)


def _prefix_counts(hits: Hits, limit: int) -> dict[Path, int]:
    """Return how many samples start with each prefix of ranks, for at most `limit` prefixes of each length.

    At one length the most frequent are kept. What is dropped, and what continues it, has `limit` prefixes before it,
    so none of it can be among the best `limit`.
    """
    counts: dict[Path, int] = {}
    prefixes: list[Path] = [()]  # of the current length, in lexicographic order
    width = int(hits.max(initial=0)) + 1
    group = np.zeros(len(hits), np.int64)  # (S,) which prefix a sample starts with, -1 for none of them
    for ranks in hits.T.astype(np.int64):  # (S,) the ranks of one head
        alive = (group >= 0) & (ranks >= 0)
        keys, inverse, count = np.unique(group[alive] * width + ranks[alive], return_inverse=True, return_counts=True)
        kept = np.sort(np.argsort(-count, kind="stable")[:limit])
        prefixes = [(*prefixes[key // width], int(key % width)) for key in keys[kept]]
        counts |= zip(prefixes, count[kept].tolist(), strict=True)
        renumbered = np.full(len(keys), -1, np.int64)
        renumbered[kept] = np.arange(len(kept))
        group = np.full(len(hits), -1, np.int64)
        group[alive] = renumbered[inverse]
    return counts


def _check_hits(hits: Hits) -> None:
    """Raise ProfileError unless hits is a (samples, heads) array of ranks and -1."""
    if hits.ndim != 2 or not np.issubdtype(hits.dtype, np.integer):
        raise ProfileError(f"hits must be integers of shape (samples, heads), got {hits.dtype} of shape {hits.shape}")
    if hits.min(initial=0) < -1:
        raise ProfileError(f"hits must be ranks, or -1 for a miss; got {hits.min()}")
