"""Chooses the tree that decodes fastest on this machine, where a calibration knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medusa_profiles.profile import TreeProfile
from medusa_profiles.simulation import tokens_per_step

from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import Acceptance, GraphCalibration
from medusa_runtime.calibration_cache import find_graph, read_cached
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN, GraphFacts
from medusa_runtime.log import LOGGER

QUANTISED = frozenset({"int8", "w8a8", "int4"})


@dataclass(frozen=True)
class Expectation:
    """What a calibration expects of decoding with a tree.

    Attributes:
        profile: The tree.
        tokens_per_step: Mean number of tokens of a step.
        step_ms: Time of a step in milliseconds.
        overhead: Time of a step over that of plain decoding.
    """

    profile: TreeProfile
    tokens_per_step: float
    step_ms: float
    overhead: float

    @property
    def speedup(self) -> float:
        """Tokens per second over those of plain decoding."""
        return self.tokens_per_step / self.overhead


def expect(
    calibration: GraphCalibration, acceptance: Acceptance, profile: TreeProfile, *, check: bool | None = None
) -> Expectation | None:
    """Return what to expect of a tree; None if it has more nodes or heads, or the half fewer answers, than needed.

    Tokens per step are those of decoding the recorded answers with the tree, exactly (`medusa_profiles.simulation`),
    except that candidates whose rank was not recorded count as rejected.

    Args:
        calibration: Measured on the machine that decodes.
        acceptance: How well the heads predict.
        profile: The tree.
        check: Only the half to check on, or only the one to fit on; None is both.
    """
    step, plain = (calibration.step_ms(nodes, acceptance.past) for nodes in (profile.size, 1))
    hits, answers = acceptance.samples(check=check)
    if step is None or plain is None or not len(hits) or profile.depth > len(acceptance.ranks):
        return None
    return Expectation(profile, tokens_per_step(profile, hits, answers), step, step / plain)


def expect_all(
    calibration: GraphCalibration, profiles: Iterable[TreeProfile], *, check: bool | None = None
) -> list[Expectation]:
    """Return what to expect of trees, as `expect` does, without those of which nothing is known.

    It is empty if the calibration does not know the acceptance.
    """
    if (acceptance := calibration.acceptance) is None:
        return []
    found = (expect(calibration, acceptance, tree, check=check) for tree in profiles)
    return [one for one in found if one is not None]


def exact_trees(precision: str, profiles: Iterable[TreeProfile]) -> list[TreeProfile]:
    """Return the trees whose tokens are exactly those of plain decoding: in quantised precisions only chains.

    A node that stands behind its sibling adds up its attention in another order; where activations are rounded to 8
    bits, the last bit of a sum can change a token.
    """
    return [tree for tree in profiles if precision not in QUANTISED or tree.is_chain]


def fastest(calibration: GraphCalibration, profiles: Iterable[TreeProfile]) -> Expectation | None:
    """Return the fastest of these trees and plain decoding, without those that are not exact (`exact_trees`).

    None if the calibration does not know the acceptance. Of equal trees it is the smallest, and then the one that
    is named by its size.
    """
    exact = exact_trees(calibration.precision, profiles)
    found = expect_all(calibration, (TreeProfile.plain(), *exact))
    named = [(one.speedup, -one.profile.size, one.profile.name == f"tree-{one.profile.size}") for one in found]
    return max(zip(named, found, strict=True), key=lambda pair: pair[0], default=(None, None))[1]


def find_calibration(bundle: Bundle, graph: GraphFacts, backend: Backend, file: Path | None) -> GraphCalibration | None:
    """Return the calibration of a graph on this machine, None if there is none.

    A calibration in the cache that is damaged or outdated is reported as a warning of the logger `medusa_runtime`.

    Args:
        bundle: The bundle.
        graph: The graph that the backend runs.
        backend: The loaded backend.
        file: A calibration to use in place of the one in the cache.

    Raises:
        CalibrationError: `file` is damaged or belongs to another bundle or graph.
    """
    digest = bundle.manifest.digest
    if file is not None:
        return find_graph(file, digest, graph.key)
    try:
        return read_cached(digest, graph.key, backend)
    except (MedusaError, OSError) as error:
        LOGGER.warning("%s; until then the bundle's default tree is used, %s", error, graph.profile)
        return None


def choose_profile(bundle: Bundle, graph: GraphFacts, calibration: GraphCalibration | None) -> TreeProfile:
    """Return the bundle's fastest exact tree for a graph on this machine, or its default where no calibration knows it.

    Raises BundleError if a tree of the bundle is invalid.
    """
    best = None if calibration is None else fastest(calibration, bundle.profiles().values())
    return find_profile(bundle, graph.profile) if best is None else best.profile


def find_profile(bundle: Bundle, name: str) -> TreeProfile:
    """Return a bundle's tree by name, where "plain" always exists; raise BundleError listing the names otherwise."""
    return TreeProfile.plain() if name == PLAIN else bundle.profile(name)
