"""Searches, for each size, the tree with the most expected tokens, and tells how fast each would decode."""

from __future__ import annotations

from collections.abc import Iterable

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.simulation import best_decoding_tree
from medusa_runtime.calibration import Acceptance, GraphCalibration
from medusa_runtime.profile_choice import Expectation, expect

from medusa_exporter.output_kinds import SEARCHED


def search_trees(calibration: GraphCalibration, acceptance: Acceptance) -> list[Expectation]:
    """Return the best tree of every measured size, fitted on one half of the answers.

    What to expect of each is measured on the other half. Sizes for which there are too few answers are left out.
    """
    hits, answers = acceptance.samples(check=False)
    found = []
    for nodes in calibration.sizes[1:]:
        try:
            tree = best_decoding_tree(hits, answers, nodes, f"best-{nodes}")
        except ProfileError:
            break
        found.append(expect(calibration, acceptance, tree, check=True))
    return [one for one in found if one is not None]


def expect_trees(
    calibration: GraphCalibration, acceptance: Acceptance, trees: Iterable[TreeProfile]
) -> list[Expectation]:
    """Return what to expect of trees on the same half of the answers; trees too large to pay are left out."""
    found = [expect(calibration, acceptance, tree, check=True) for tree in trees]
    return [one for one in found if one is not None]


def with_source(found: Expectation, calibration: GraphCalibration, acceptance: Acceptance, model: str) -> TreeProfile:
    """Return the tree with a line that says for what it was found, and what to expect of it."""
    machine = calibration.machine
    threads = f", {machine.threads} threads" if machine.threads else ""
    source = (
        f"{SEARCHED}{model}, {calibration.graph}: {found.tokens_per_step:.2f} tokens/step, overhead "
        f"{found.overhead:.2f}, speed-up {found.speedup:.2f} expected on {machine.device}{threads}, past of "
        f"{acceptance.past:.0f} tokens"
    )
    return TreeProfile(found.profile.name, found.profile.paths, source)
