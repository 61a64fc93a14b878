"""Counters of an engine: what it was asked, how its trees did, and where the time went."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from medusa_runtime.drafting.draft_tree import DraftTree

MAX_NAMES, OTHERS = 256, "others"  # of drafts that are counted: callers may name trees of their own as they like


@dataclass(frozen=True)
class Stats:
    """Totals since an engine was loaded, at one moment.

    Args:
        waiting: Requests that wait now.
        running: Requests at work now.
        finished: Requests that were answered completely.
        cancelled: Requests that were cancelled, whose deadline passed, or that ended with the engine.
        failed: Requests that ended with another error.
        prompt_tokens: Tokens of the prompts that were computed, reused ones included.
        reused_tokens: How many of them were not computed again, since an earlier request had computed their keys and
            values.
        completion_tokens: Tokens of all answers.
        steps: Steps; prefills do not count.
        step_tokens: Tokens of all steps; the first token of an answer is of its prefill.
        drafts: Steps with a tree or literals; the others were plain decoding.
        draft_tokens: Candidates in these trees.
        accepted_tokens: Candidates that were accepted.
        accepted_by_depth: Element d is the number of steps that accepted a candidate of depth d + 1.
        drafted_by_depth: Element d is the number of steps whose tree had candidates of depth d + 1 within the answer:
            those behind its limit or its end do not count.
        steps_by_draft: Number of steps by what they verified: "plain", the name of a tree, "ngram-7" for seven
            literals, copied from the text before or forced by a schema, or both joined by a plus sign; "others" are
            those behind the first 256 names.
        queue_seconds: Time that all requests that have ended had waited before their prefill, or before their end.
        prefill_seconds: Duration of all prefills.
        step_seconds: Duration of all steps.
        kv_rows: Rows of the KV cache in use.
        kv_capacity: Rows of the KV cache for which memory is allocated.
    """

    waiting: int = 0
    running: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_depth: tuple[int, ...] = ()
    drafted_by_depth: tuple[int, ...] = ()
    steps_by_draft: Mapping[str, int] = field(default_factory=dict)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0
    kv_rows: int = 0
    kv_capacity: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per step: the accepted candidates, and one that the decoder chose itself."""
        return self.step_tokens / self.steps if self.steps else 0.0


@dataclass
class DepthCounts:
    """How often candidates of each depth were drafted and accepted; element d stands for depth d + 1."""

    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    def add(self, accepted: int, depth: int) -> None:
        """Add one step that accepted `accepted` candidates of a tree of depth `depth`."""
        for counts, most in ((self.accepted, accepted), (self.drafted, depth)):
            counts.extend([0] * (depth - len(counts)))
            for at in range(most):
                counts[at] += 1


class StatsCollector:
    """Adds up an engine's counters. The scheduler's thread writes, any thread reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = {}
        self._depths = DepthCounts()
        self._drafts: dict[str, int] = {}

    def add(self, **amounts: float) -> None:
        """Add to counters, by the names of `Stats`."""
        with self._lock:
            self._add(amounts)

    def add_step(self, seconds: float, tokens: int, accepted: int, tree: DraftTree, depth: int) -> None:
        """Add one step.

        Args:
            seconds: Its duration.
            tokens: Tokens that the answer gained.
            accepted: How many of them were candidates.
            tree: What it verified.
            depth: Depth of the tree within the answer.
        """
        with self._lock:
            self._depths.add(accepted, depth)
            self._add({"steps": 1, "step_seconds": seconds, "step_tokens": tokens, "accepted_tokens": accepted})
            name = tree.name if tree.name in self._drafts or len(self._drafts) < MAX_NAMES else OTHERS
            self._drafts[name] = self._drafts.get(name, 0) + 1
            if tree.size > 1:
                self._add({"drafts": 1, "draft_tokens": tree.size - 1})

    def snapshot(self, **now: int) -> Stats:
        """Return the totals.

        Args:
            now: Values of the counters that are not totals.
        """
        with self._lock:
            accepted, drafted = tuple(self._depths.accepted), tuple(self._depths.drafted)
            depths = {"accepted_by_depth": accepted, "drafted_by_depth": drafted}
            return Stats(steps_by_draft=dict(self._drafts), **depths, **self._totals, **now)  # type: ignore[arg-type]

    def _add(self, amounts: dict[str, float]) -> None:
        for name, amount in amounts.items():
            self._totals[name] = self._totals.get(name, 0) + amount
