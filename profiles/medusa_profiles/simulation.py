"""What a tree gives when answers are really decoded with it: a step starts only where the last one ended.

`hits` (S, K) as in `search`, but in order: `answers` (S,) says which answer each sample belongs to, all samples of one
answer one after the other, every position of it once. Greedy decoding visits some of them, so this is exact, not an
estimate: a head's guess depends on the position alone, never on the tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import Hits, best_tree

ROUNDS = 4  # of fitting on the steps that the last tree takes; it settles after two or three

Answers = npt.NDArray[np.integer[Any]]


def steps_taken(profile: TreeProfile, hits: Hits, answers: Answers) -> npt.NDArray[np.bool_]:
    """Return (S,) bool: where greedy decoding with the tree starts a step. Raises ProfileError as `search` does."""
    if len(hits) != len(answers):
        raise ProfileError(f"{len(hits)} samples, but answers of {len(answers)}")
    if profile.depth > hits.shape[1]:
        raise ProfileError(f"tree '{profile.name}' is {profile.depth} deep but the samples cover {hits.shape[1]} heads")
    gained = np.ones(len(hits), np.int64)  # tokens of a step that starts here
    for path in profile.paths:
        gained[(hits[:, : len(path)] == path).all(axis=1)] = len(path) + 1  # sorted: the longest comes last
    taken = np.zeros(len(hits), np.bool_)
    at = np.flatnonzero(
        np.diff(answers, prepend=answers[:1] - 1)
    )  # where each answer begins, then where each step does
    ends = np.append(at[1:], len(hits))
    while len(at):
        taken[at] = True
        at = at + gained[at]
        at, ends = at[at < ends], ends[at < ends]
    return taken


def tokens_per_step(profile: TreeProfile, hits: Hits, answers: Answers) -> float:
    """Return the mean tokens per step of decoding all answers; raises ProfileError for no samples."""
    if len(hits) == 0:
        raise ProfileError("tokens per step need at least one sample, got none")
    return len(hits) / int(steps_taken(profile, hits, answers).sum())


def best_decoding_tree(hits: Hits, answers: Answers, nodes: int, name: str, source: str = "") -> TreeProfile:
    """Return the tree of `nodes` nodes, root included, found best for decoding these answers.

    `best_tree` on the steps that the tree found before takes, again and again; the best of all rounds. Raises
    ProfileError as `best_tree` does.
    """
    best = tree = best_tree(hits, nodes, name, source)
    for _ in range(ROUNDS):
        tree = best_tree(hits[steps_taken(tree, hits, answers)], nodes, name, source)
        if tokens_per_step(tree, hits, answers) > tokens_per_step(best, hits, answers):
            best = tree
    return best
