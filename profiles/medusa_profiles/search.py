"""Finds the best tree for measured head accuracies, and predicts the tokens per step of a tree.

Both functions read `hits`, an integer array (S, K): hits[s, k] is the rank (0-based) at which head k ranked the true
token at sample s, or -1 where it was not among the recorded ranks. A node is accepted at a sample where its path equals
the first ranks of that row. So the expected tokens per step are 1 (the decoder's own) + the sum of the frequencies of
the tree's nodes. A prefix of ranks is at least as frequent as its continuations, so the most frequent prefixes always
form a tree, and this tree is the best one of its size.

Example: the hits of two heads at four samples are [[0, 0], [0, 1], [0, -1], [1, 0]]. The path [0] is accepted at three
samples, [0, 0], [0, 1], [1] and [1, 0] at one each. The best tree of 3 nodes has the paths [0] and [1] and yields
1 + (3 + 1) / 4 = 2 tokens per step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_profiles.profile import Path, ProfileError, TreeProfile

Hits = npt.NDArray[np.integer[Any]]


def best_tree(hits: Hits, nodes: int, name: str, source: str = "") -> TreeProfile:
    """Return the tree of a given size with the most expected tokens per step.

    Ties go to the shorter path, then to the lexicographically smaller one, so the result is deterministic.

    Args:
        hits: Integers (S, K): the rank of the true token at each of S samples for each of K heads, -1 for a miss.
        nodes: Number of nodes of the tree, including the root.
        name: Name of the tree.
        source: Where the tree comes from, one line of text.

    Raises:
        ProfileError: `hits` has another shape or type, or fewer than nodes - 1 distinct prefixes of ranks.
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
    """Return the mean number of tokens per step, 1 or more, that greedy verification of a tree accepts.

    Args:
        profile: The tree.
        hits: Integers (S, K): the rank of the true token at each of S samples for each of K heads, -1 for a miss.

    Raises:
        ProfileError: `hits` has another shape or type, is empty, or has fewer heads than the tree needs; or the tree is
            not one of the heads' candidates.
    """
    _check_hits(hits)
    profile.check_candidates()
    if len(hits) == 0:
        raise ProfileError("expected tokens need at least one sample, got none")
    if profile.depth > hits.shape[1]:
        raise ProfileError(f"tree '{profile.name}' is {profile.depth} deep but the samples cover {hits.shape[1]} heads")
    accepted = sum(int((hits[:, : len(path)] == path).all(axis=1).sum()) for path in profile.paths)
    return 1 + accepted / len(hits)


def _prefix_counts(hits: Hits, limit: int) -> dict[Path, int]:
    """Count the samples that start with each prefix of ranks, for the `limit` most frequent prefixes of each length.

    A dropped prefix and its continuations are less frequent than `limit` others, so none is among the best `limit`.
    """
    counts: dict[Path, int] = {}
    prefixes: list[Path] = [()]  # of the current length, in lexicographic order
    width = int(hits.max(initial=0)) + 1
    group = np.zeros(len(hits), np.int64)  # (S,) index of the prefix that a sample starts with, -1 for none
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
