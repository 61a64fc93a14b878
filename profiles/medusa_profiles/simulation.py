"""Simulates greedy decoding with a tree on recorded head accuracies: a step starts where the last one ended.

`hits` (S, K) is that of `search`, but in the order of the answers: `answers` (S,) identifies the answer that each
sample belongs to; the samples of one answer are consecutive and hold every position once. The result is exact, not an
estimate, because a head's candidates depend on the position only, never on the tree.

Example: one answer of four positions whose first head ranks the true token at [0, 1, 0, 0]. With the single path [0],
the first step accepts a candidate and covers positions 0 and 1, and the second one starts at position 2 and covers the
rest: 2 steps, 2 tokens per step. `expected_tokens` would average over all positions and predict 1.75.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import Hits, best_tree

ROUNDS = 4  # of fitting to the positions where the last tree starts steps; it converges after two or three

Answers = npt.NDArray[np.integer[Any]]


def steps_taken(profile: TreeProfile, hits: Hits, answers: Answers) -> npt.NDArray[np.bool_]:
    """Return where greedy decoding with the tree starts a step, (S,) bool; raises ProfileError as `search` does."""
    if len(hits) != len(answers):
        raise ProfileError(f"{len(hits)} samples, but answers of {len(answers)}")
    profile.check_candidates()
    if profile.depth > hits.shape[1]:
        raise ProfileError(f"tree '{profile.name}' is {profile.depth} deep but the samples cover {hits.shape[1]} heads")
    gained = np.ones(len(hits), np.int64)  # tokens of a step that starts at each position
    for path in profile.paths:
        gained[(hits[:, : len(path)] == path).all(axis=1)] = len(path) + 1  # sorted: the longest comes last
    taken = np.zeros(len(hits), np.bool_)
    at = np.flatnonzero(np.diff(answers, prepend=answers[:1] - 1))  # start of each answer, then of each of its steps
    ends = np.append(at[1:], len(hits))
    while len(at):
        taken[at] = True
        at = at + gained[at]
        at, ends = at[at < ends], ends[at < ends]
    return taken


def tokens_per_step(profile: TreeProfile, hits: Hits, answers: Answers) -> float:
    """Return the mean tokens per step when all answers are decoded; raises ProfileError if there are no samples."""
    if len(hits) == 0:
        raise ProfileError("tokens per step need at least one sample, got none")
    return len(hits) / int(steps_taken(profile, hits, answers).sum())


def best_decoding_tree(hits: Hits, answers: Answers, nodes: int, name: str, source: str = "") -> TreeProfile:
    """Return the best tree found for decoding these answers, of `nodes` nodes including the root.

    Runs `best_tree` repeatedly, each time on the positions where the previous tree starts steps, and returns the best
    tree of all rounds. Raises ProfileError as `best_tree` does.
    """
    best = tree = best_tree(hits, nodes, name, source)
    for _ in range(ROUNDS):
        tree = best_tree(hits[steps_taken(tree, hits, answers)], nodes, name, source)
        if tokens_per_step(tree, hits, answers) > tokens_per_step(best, hits, answers):
            best = tree
    return best
