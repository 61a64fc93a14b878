"""Refuses steps with node ids that no graph can fill, before a library computes with them."""

from __future__ import annotations

from medusa_profiles.node_ids import describe

from medusa_runtime.backends.base import Step
from medusa_runtime.facts import HeadFacts


def least_node_id(step: Step, heads: HeadFacts) -> int:
    """Return the least id that a node of a step may have; the arguments are those of `check_node_ids`."""
    return -heads.count * heads.top_k if step.draft else 0


def check_node_ids(step: Step, heads: HeadFacts) -> None:
    """Raise RuntimeError unless every node is a token id or, in a step with a draft, a candidate of one of the heads.

    A GPU would gather from memory that has no such candidate, and report nothing.

    Args:
        step: The step that is to run.
        heads: The heads whose candidates the graph can fill in.
    """
    least, allowed = int(step.input_ids.min()), least_node_id(step, heads)
    if least < allowed:
        expected = f"token ids and the heads' candidates, {allowed} to -1" if step.draft else "token ids only"
        what = describe(least, heads.top_k) if heads.count else "a candidate, but there are no heads"
        raise RuntimeError(
            f"a node has the id {least}, {what}; expected {expected} in a step "
            f"{'with' if step.draft else 'without'} a draft: choose a tree that fits the bundle's heads"
        )
