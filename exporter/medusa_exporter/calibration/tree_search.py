"""Searches, for each size, the tree with the most expected tokens, and tells how fast each would decode."""

from __future__ import annotations

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.simulation import best_decoding_tree
from medusa_runtime.calibration import Acceptance, GraphCalibration
from medusa_runtime.profile_choice import QUANTISED, Expectation, expect_all

from medusa_exporter.output_kinds import SEARCHED


def search_trees(calibration: GraphCalibration, acceptance: Acceptance) -> list[Expectation]:
    """Return the best tree of every measured size, fitted on one half of the answers.

    What to expect of each is measured on the other half. Sizes for which there are too few answers are left out, and in
    quantised precisions all trees but chains (`exact_trees`).
    """
    hits, answers = acceptance.samples(check=False)
    chains_only = calibration.precision in QUANTISED
    trees = []
    for nodes in calibration.sizes[1:]:
        name = f"best-{nodes}"
        if chains_only and nodes > len(acceptance.ranks) + 1:
            break
        try:
            best = best_decoding_tree(hits, answers, nodes, name)
            chain = tuple((0,) * depth for depth in range(1, nodes))
            trees.append(TreeProfile(name, chain) if chains_only else best)
        except ProfileError:
            break
    return expect_all(calibration, trees, check=True)


def with_source(found: Expectation, calibration: GraphCalibration, acceptance: Acceptance, model: str) -> TreeProfile:
    """Return the tree with a line that says for what it was found, and what to expect of it."""
    source = (
        f"{SEARCHED}{model}, {calibration.graph}: {found.tokens_per_step:.2f} tokens/step, overhead "
        f"{found.overhead:.2f}, speed-up {found.speedup:.2f} expected on {calibration.machine}, past of "
        f"{acceptance.past:.0f} tokens"
    )
    return TreeProfile(found.profile.name, found.profile.paths, source)
