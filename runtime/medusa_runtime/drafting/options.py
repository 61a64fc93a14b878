"""What an engine may verify, from the bundle's trees, the backend and a calibration."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_profiles.simulation import steps_taken

from medusa_runtime.backends.base import Backend
from medusa_runtime.calibration import Acceptance, GraphCalibration
from medusa_runtime.drafting.controller import DraftOptions, Experience
from medusa_runtime.drafting.step_times import NODE_COST, Kind, StepTimes
from medusa_runtime.profile_choice import QUANTISED, exact_trees, expect_all
from medusa_runtime.warm_up import WARM_UP_RUNS

GUESS = 0.6  # probability of one depth more of a tree that was not calibrated
HEADS_COST = 0.15  # of plain decoding's time that the heads are assumed to cost before they were measured
GPU_NODE_COST = 0.006  # as NODE_COST: on a GPU a step of 64 nodes takes 1.3 to 1.6 times as long as plain decoding
MAX_TREES = 4  # among which the controller chooses: each is a shape that a GPU prepares


def experience_of(
    default: TreeProfile,
    exact: Collection[TreeProfile],
    backend: Backend,
    calibration: GraphCalibration | None,
) -> Experience:
    """Return what an engine knows before its first answer.

    Args:
        default: The tree of requests that name none.
        exact: The bundle's trees whose tokens are exactly those of plain decoding.
        backend: Runs the steps.
        calibration: What was measured on this machine, None if nothing was.
    """
    if calibration is None or calibration.acceptance is None:
        smallest = {tree.paths: tree for tree in exact if tree.size == 2}  # bundles have some trees under two names
        known = {**smallest, default.paths: default} if default.size > 1 else {}
        large_first = sorted(exact_trees(backend.precision, known.values()), key=lambda tree: -tree.size)
        trees = {tree: (GUESS,) * tree.depth for tree in large_first}
    else:
        trees = {tree: depth_rates(tree, calibration.acceptance) for tree in _best_trees(calibration, exact)}

    def guess(kind: Kind) -> float | None:
        measured = None if calibration is None else _measured(calibration, kind, has_heads=backend.heads.count > 0)
        if measured is not None:
            return measured
        plain = 1.0 if calibration is None else _measured(calibration, Kind(1, heads=False), has_heads=False)
        assert plain is not None  # noqa: S101 -- every calibration has plain decoding
        return plain * (1 + node_cost * (kind.nodes - 1) + HEADS_COST * kind.heads)

    mixed = backend.mixes_drafts and backend.precision not in QUANTISED  # two branches are no chain (`exact_trees`)
    node_cost = NODE_COST if backend.logits_on_host else GPU_NODE_COST
    skipped = WARM_UP_RUNS if backend.padded_past_lengths else 0
    return Experience(DraftOptions(trees, tuple(backend.literal_counts), mixed), StepTimes(guess, skipped))


def depth_rates(tree: TreeProfile, acceptance: Acceptance) -> tuple[float, ...]:
    """Return for each depth the probability that a candidate is accepted behind an accepted one of the depth before.

    Args:
        tree: A tree of at most as many heads as were calibrated.
        acceptance: How well the heads predict.
    """
    hits, answers = acceptance.samples()
    starts = hits[steps_taken(tree, hits, answers)]
    reached = np.zeros(len(starts), np.int64)  # depth of the accepted path of each step
    for path in tree.paths:
        reached[(starts[:, : len(path)] == path).all(axis=1)] = len(path)  # sorted: the longest comes last
    counts = [int((reached >= depth).sum()) for depth in range(tree.depth + 1)]
    return tuple((after + 1) / (before + 2) for before, after in pairwise(counts))


def _best_trees(calibration: GraphCalibration, exact: Collection[TreeProfile]) -> list[TreeProfile]:
    """Return the fastest tree, and the fastest of those with at most half of its nodes, and so on."""
    found, chosen, most = expect_all(calibration, exact), list[TreeProfile](), None
    while len(chosen) < MAX_TREES:
        smaller = [one for one in found if most is None or one.profile.size <= most]
        if not smaller:
            break
        best = max(smaller, key=lambda one: one.speedup).profile
        chosen.append(best)
        most = (best.size + 1) // 2
    return chosen


def _measured(calibration: GraphCalibration, kind: Kind, *, has_heads: bool) -> float | None:
    """Return the calibrated time of a step; that of a chain of literals is derived from trees of as many nodes.

    Steps of several nodes were measured with the heads, in a bundle without heads as chains of literals.
    """
    acceptance, pasts = calibration.acceptance, calibration.pasts
    past = pasts[len(pasts) // 2] if acceptance is None else acceptance.past
    if kind.heads or kind.nodes == 1 or not has_heads:
        return calibration.step_ms(kind.nodes, past)
    smallest = min((nodes for nodes in calibration.sizes if nodes > 1), default=None)
    if smallest is None:
        return None
    times = [calibration.step_ms(nodes, past) for nodes in (1, max(kind.nodes, smallest), smallest)]
    plain, wide, narrow = times
    return None if plain is None or wide is None or narrow is None else plain * 1.02 + max(0.0, wide - narrow)
