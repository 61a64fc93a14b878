"""Which steps are compared, and how both sides come to take the same ones.

The reference decodes greedily, as `medusa_runtime.decoder` does: it prefills a prompt, and behind it takes every step
twice, plain and as a tree, of which the path that it accepts itself is kept. The other side replays: it gets the tokens
that the reference had and keeps the same path, so that both pasts stand for the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_runtime import contract
from medusa_runtime.accept import greedy
from medusa_runtime.backends.base import PREFILL_CHUNK, IntArray, Step, StepOutputs, literal_step
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError

Kind = Literal["prefill", "plain", "tree"]
KINDS: tuple[Kind, ...] = ("prefill", "plain", "tree")


@dataclass(frozen=True, eq=False)
class Plan:
    """What is run. prompts: token ids of each; tree: what tree steps run; steps: behind each prompt, at most.

    stop_ids: tokens behind which nothing is decoded.
    """

    prompts: tuple[tuple[int, ...], ...]
    tree: TreeProfile
    steps: int
    stop_ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows that a past must have room for: the longest prompt, all paths at their longest, and one tree more."""
        return max(map(len, self.prompts)) + rows_needed(self.tree, self.steps)


def rows_needed(tree: TreeProfile, steps: int) -> int:
    """Return how many rows so many steps of a tree take behind a prompt, at most."""
    return steps * (tree.depth + 1) + tree.size


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Where a step stands: in prompt `prompt` (from 1), step `number` behind it (from 1; a prefill's chunks too).

    ids (T,): its tokens, a tree's candidates by head and rank; length: rows of the past.
    """

    prompt: int
    number: int
    kind: Kind
    ids: IntArray
    length: int


@dataclass(frozen=True, eq=False)
class ReferenceStep:
    """A step as the reference took it. path: the nodes that both sides keep; empty for a plain step."""

    place: StepInputs
    outputs: StepOutputs
    path: list[int]


class Reference(Protocol):
    """Who says what comes out of a step: a backend, or a recording of one."""

    def take(self, place: StepInputs) -> StepOutputs:
        """Return all that the step gives. Places come in the order in which `run_steps` makes them."""

    def keep(self, path: Sequence[int]) -> None:
        """Commit these nodes of the step taken last."""


class StepRunner:
    """Takes steps on a backend."""

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        """Use a decoder's backend and cache. Raises CapacityError where the plan does not fit its context."""
        if plan.rows > decoder.cache.context:
            raise CapacityError(
                f"prompts and steps take up to {plan.rows} tokens, {decoder.backend.name} has a context of "
                f"{decoder.cache.context}; take shorter prompts or fewer --steps"
            )
        self._backend, self._cache, self._tree = decoder.backend, decoder.cache, plan.tree

    def take(self, place: StepInputs) -> StepOutputs:
        """Run one step. Raises CapacityError for one that the backend cannot run."""
        if not place.length:
            self._cache.truncate(0)
        self._cache.reserve(place.length + len(place.ids))
        self._backend.run(self._step(place, place.ids))
        return self._backend.read_outputs()

    def replay(self, taken: ReferenceStep) -> StepOutputs:
        """Run the step that the reference took, and keep what it kept.

        A tree is run twice: with its candidates, for the tokens alone, and with the tokens that the reference had in
        their place, for all the rest: where two candidates tie, another one must not look like an error behind it.
        """
        place = taken.place
        outputs = self.take(place)
        if place.kind == "tree":
            tokens: IntArray = taken.outputs[contract.TOKENS][0].astype(np.int32)
            self._backend.run(self._step(place, tokens))
            outputs = self._backend.read_outputs() | {contract.TOKENS: outputs[contract.TOKENS]}
        self.keep(taken.path)
        return outputs

    def keep(self, path: Sequence[int]) -> None:
        """Commit these nodes of the step taken last."""
        self._cache.commit(path)

    def _step(self, place: StepInputs, ids: IntArray) -> Step:
        if place.kind != "tree":
            return literal_step(ids, place.length, np.array([len(ids) - 1], np.int32))
        tree = self._tree
        return Step(
            input_ids=ids[None],
            position_ids=(place.length + tree.depths)[None],
            tree_mask=np.ascontiguousarray(tree.mask[None]),
            past_length=np.array([place.length], np.int32),
            logit_rows=np.arange(tree.size, dtype=np.int32)[None],
            draft=True,
        )


def run_steps(reference: Reference, plan: Plan, top_k: int) -> Iterator[ReferenceStep]:
    """Take every step of the plan; whoever replays must do so before the next one is asked for.

    top_k: candidates of each head. A prompt ends early at a stop token.
    """
    candidates, stop = plan.tree.candidate_ids(top_k), frozenset(plan.stop_ids)
    for prompt, ids in enumerate(plan.prompts, start=1):
        length, root = 0, 0
        for number, first in enumerate(range(0, len(ids), PREFILL_CHUNK), start=1):
            chunk = np.array(ids[first : first + PREFILL_CHUNK], np.int32)
            place = StepInputs(prompt, number, "prefill", chunk, length)
            outputs, path = reference.take(place), list(range(len(chunk)))
            yield ReferenceStep(place, outputs, path)
            reference.keep(path)
            length, root = length + len(chunk), int(outputs[contract.ARGMAX][0, -1])
        ended = root in stop
        for number in range(1, plan.steps + 1):
            if ended:
                break
            place = StepInputs(prompt, number, "plain", np.array([root], np.int32), length)
            yield ReferenceStep(place, reference.take(place), [])
            nodes = candidates.copy()  # (T,)
            nodes[0] = root
            place = StepInputs(prompt, number, "tree", nodes, length)
            outputs = reference.take(place)
            tokens, argmax = (outputs[name][0].tolist() for name in (contract.TOKENS, contract.ARGMAX))
            path, root = greedy(plan.tree, tokens, argmax)
            yield ReferenceStep(place, outputs, path)
            reference.keep(path)
            length += len(path)
            ended = not stop.isdisjoint([root, *(tokens[node] for node in path)])
