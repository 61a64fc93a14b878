"""Times steps of every size behind pasts of several lengths, in turns, each with all that decoding does in a step."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from medusa_profiles.profile import Path, TreeProfile
from medusa_runtime.accept import AcceptRule
from medusa_runtime.backends.base import Backend
from medusa_runtime.calibration import StepTime
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import HeadFacts
from medusa_runtime.rows import StepRows
from medusa_runtime.tree_step import TreeStep
from medusa_runtime.warm_up import WARM_UP_RUNS

from medusa_exporter.bench.forced_acceptance import ForcedAcceptance
from medusa_exporter.bench.timing import rotated

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # nodes; 1 is plain decoding
PASTS = (64, 256, 1024)  # tokens
TOKENS_KEPT = 2  # of each tree's step, about what trained heads reach
# A visit to a size runs steps for some time before it times any: after a step of many rows, steps of one row took 11%
# longer at first than 0.3 seconds later (w8a8 with AMX), and those of four 8%; decoding does not alternate so.
SETTLE_SECONDS = 0.15
BURST_SECONDS, BURST = 0.1, 8  # then it times steps for so long, and at most so many
MIN_ROUNDS, MAX_ROUNDS = 3, 40  # visits to each size

Cell = tuple[int, int]  # (nodes, past)


class _Draft(NamedTuple):
    """What a timed step verifies: a tree of the heads' candidates, or literals behind the root."""

    profile: TreeProfile
    literals: int


def usual_draft(nodes: int, heads: HeadFacts) -> _Draft | None:
    """Return a draft of a given size: `usual_tree`, or literals where there are no heads; None without such a tree."""
    if not heads.count:
        return _Draft(TreeProfile.plain(), nodes - 1)
    tree = usual_tree(nodes, heads)
    return None if tree is None else _Draft(tree, 0)


def usual_tree(nodes: int, heads: HeadFacts) -> TreeProfile | None:
    """Return a tree of a given size; None if the heads have too few candidates. Only its size affects the step's time.

    It has the paths with the lowest sum of (rank + 1), about as fitted trees do: 4 nodes are [0], [0, 0], [1].
    """
    candidates: list[tuple[int, Path]] = [(1, (0,))]
    paths: list[Path] = []
    while candidates and len(paths) < nodes - 1:
        cost, path = heapq.heappop(candidates)
        paths.append(path)
        if path[-1] + 1 < heads.top_k:
            heapq.heappush(candidates, (cost + 1, (*path[:-1], path[-1] + 1)))
        if len(path) < heads.count:
            heapq.heappush(candidates, (cost + 1, (*path, 0)))
    return TreeProfile(f"size-{nodes}", tuple(paths)) if len(paths) == nodes - 1 else None


def choose_pasts(context: int) -> list[int]:
    """Return the lengths of the past to measure: those that leave half of the context, at least one."""
    return [past for past in PASTS if past <= context // 2] or [context // 4]


def measure_step_times(
    backend: Backend,
    sizes: Sequence[int],
    text: Sequence[int],
    seconds: float,
    advance: Callable[[float], None] = lambda _seconds: None,
) -> tuple[StepTime, ...]:
    """Time steps of plain decoding and of trees on a loaded backend that no decoder uses.

    Without heads, steps of several nodes verify literals. Every round visits all sizes and lengths once. Sizes are left
    out from the first one on that takes so long that no acceptance can pay for it: a step adds at most one token more
    than there are heads, or as many as it has nodes where these are literals.

    Args:
        backend: The backend.
        sizes: Numbers of nodes, ascending; the first is 1.
        text: Token ids of a text, at least as many as the longest past of `choose_pasts`. Steps continue it, since the
            time of a step depends on its data: a choice between equal values is made faster.
        seconds: How long to measure. Three rounds are always made.
        advance: Called with the seconds that a part of the work has taken.

    Raises:
        CapacityError: The memory does not suffice for plain decoding.
        InvalidLogitsError: Logits are not finite.
    """
    started = perf_counter()
    context = backend.model.context
    pasts = choose_pasts(context)
    drafts = {nodes: usual_draft(nodes, backend.heads) for nodes in sizes if pasts[-1] + nodes <= context}
    known = {nodes: draft for nodes, draft in drafts.items() if draft is not None}
    timer = _Timer(backend, known, text[: pasts[-1]])
    kept = timer.sizes_that_can_pay(pasts[0])
    done = _Clock(advance, started, seconds)
    done.report()
    cells = [(nodes, past) for past in pasts for nodes in kept]
    for number in range(MAX_ROUNDS):
        begun = perf_counter()
        for cell in rotated(cells, number * (len(kept) + 1)):
            timer.visit(cell)
            done.report()
        now = perf_counter()
        if number + 1 >= MIN_ROUNDS and now + (now - begun) > started + seconds:
            break
    return tuple(_summarised(cell, timer.seconds[cell]) for cell in cells)


class _Clock:
    """Reports the seconds that have passed, but no more than were planned."""

    def __init__(self, advance: Callable[[float], None], started: float, planned: float) -> None:
        self._advance, self._started, self._planned = advance, started, planned
        self._reported = 0.0

    def report(self) -> None:
        passed = min(perf_counter() - self._started, self._planned)
        self._advance(passed - self._reported)
        self._reported = passed


class _Timer:
    """Runs and times steps of drafts, by their number of nodes, behind the first tokens of a text."""

    def __init__(self, backend: Backend, drafts: Mapping[int, _Draft], text: Sequence[int]) -> None:
        self.seconds: dict[Cell, list[float]] = {}
        self._backend, self._drafts = backend, drafts
        self._rows = StepRows(backend)
        self._decoder = Decoder(backend)  # keeps other decoders away from the backend
        self._root = self._decoder.start(text, 2, ())[0]
        self._decoder.cache.reserve(len(text) + max(self._drafts))

    def sizes_that_can_pay(self, past: int) -> list[int]:
        """Visit the sizes, ascending, until one takes too long; return those before."""
        kept: list[int] = []
        for nodes in self._drafts:
            try:
                self.visit((nodes, past))
            except CapacityError:
                if nodes == 1:
                    raise
                continue  # an engine or the memory is too small for it
            if kept and self._is_too_slow(nodes, past):
                for again in (1, nodes):  # something else may have taken the processor
                    self.visit((again, past))
                if self._is_too_slow(nodes, past):
                    break
            kept.append(nodes)
        return kept

    def _is_too_slow(self, nodes: int, past: int) -> bool:
        """Whether a step's fastest run took longer than as many plain steps as tokens that it can add."""
        heads = self._backend.heads.count
        return min(self.seconds[nodes, past]) > (heads + 1 if heads else nodes) * min(self.seconds[1, past])

    def visit(self, cell: Cell) -> None:
        """Time a few steps after others that are not timed, which bind the tree's arrays and settle the processor."""
        nodes, past = cell
        draft = self._drafts[nodes]
        step = TreeStep(draft.profile, self._backend.heads.top_k, literals=draft.literals)
        rule = ForcedAcceptance([TOKENS_KEPT])
        warm = WARM_UP_RUNS if self._backend.padded_past_lengths else 1
        taken = [self._step(step, past, rule) for _ in range(warm)][-1]
        for _ in range(int(SETTLE_SECONDS / taken)):
            taken = self._step(step, past, rule)
        count = max(1, min(BURST, int(BURST_SECONDS / taken)))
        self.seconds.setdefault(cell, []).extend(self._step(step, past, rule) for _ in range(count))

    def _step(self, step: TreeStep, past: int, rule: AcceptRule) -> float:
        """Do what `medusa_runtime.decoder.Decoder.step` does, but stay behind the same past; return the seconds.

        The token that follows is the next root, so that each step has other data.
        """
        backend = self._backend
        started = perf_counter()
        step.update(self._root, past, (self._root,) * step.tree.literals)
        backend.run(step.step)
        tokens = backend.read_tokens()
        rows = self._rows
        rows.begin("of a measured step")
        path, self._root = rule(step.tree, tokens, backend.read_argmax(), rows)
        for row in path:
            rows.check(row)
        backend.commit(0, path, past)
        return perf_counter() - started


def _summarised(cell: Cell, seconds: Sequence[float]) -> StepTime:
    low, middle, high = (1e3 * value for value in np.percentile(seconds, (25, 50, 75)).tolist())
    return StepTime(1, *cell, round(middle, 4), round(high - low, 4), len(seconds))
