"""Runs the steps of a comparison: the reference decodes, and the other side replays its steps.

The reference decodes greedily, as `medusa_runtime.decoder` does. It prefills each prompt, then runs every step twice on
the same KV cache: once plain and once as a tree. It commits the path that the tree accepted. The other side runs the
same steps with the reference's tokens and commits the same path, so that both KV caches always stand for the same text.
Without heads, steps are run plain only.
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

from medusa_exporter.compare.row_summaries import summary_error

Kind = Literal["prefill", "plain", "tree"]
KINDS: tuple[Kind, ...] = ("prefill", "plain", "tree")


@dataclass(frozen=True, eq=False)
class ComparisonPlan:
    """The work of a comparison.

    Attributes:
        prompts: Token ids of each prompt.
        tree: The tree that tree steps use; the one of plain decoding, without heads, has no tree steps.
        steps: Maximum number of steps after each prompt.
        stop_ids: Tokens that end an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    tree: TreeProfile
    steps: int
    stop_ids: tuple[int, ...]

    @property
    def cache_rows(self) -> int:
        """The KV cache rows that are needed: the longest prompt, then the longest path in every step and one tree."""
        return max(map(len, self.prompts)) + rows_needed(self.tree, self.steps)


def rows_needed(tree: TreeProfile, steps: int) -> int:
    """Return the largest number of KV cache rows that `steps` tree steps need after a prompt."""
    return steps * (tree.depth + 1) + tree.size


@dataclass(frozen=True, eq=False)
class StepInputs:
    """The inputs of one step and its position in the plan.

    Attributes:
        prompt: Number of the prompt, from 1.
        step: Number of the step after that prompt, from 1; chunks of a prefill are counted in the same way.
        kind: Whether the step is part of a prefill, a plain step or a tree step.
        ids: (T,) token ids; a tree's candidates are -1 - (head * top_k + rank).
        length: Number of rows in the KV cache before the step.
    """

    prompt: int
    step: int
    kind: Kind
    ids: IntArray
    length: int


@dataclass(frozen=True, eq=False)
class ReferenceStep:
    """A step with the outputs that the reference computed.

    Attributes:
        inputs: The inputs of the step.
        outputs: All outputs, by name.
        path: The nodes that both sides commit; empty for a plain step that is run again as a tree.
        summary_error: How far the summaries of its rows are from its own logits; None if it has none.
    """

    inputs: StepInputs
    outputs: StepOutputs
    path: list[int]
    summary_error: float | None = None


class Reference(Protocol):
    """Computes or reads the correct outputs of each step: a backend, or a saved reference file.

    Attributes:
        summary_error: How far the summaries of the last step's rows are from its own logits (`row_summaries`); None if
            it has no summaries, as a file never has.
    """

    summary_error: float | None

    def run(self, inputs: StepInputs) -> StepOutputs:
        """Return all outputs of a step. Steps come in the order in which `run_steps` makes them."""

    def commit(self, path: Sequence[int]) -> None:
        """Keep these nodes of the last step in the KV cache."""


class BackendRunner:
    """Runs the steps of a plan on a backend: as the reference, or to replay the reference's steps."""

    def __init__(self, decoder: Decoder, plan: ComparisonPlan) -> None:
        """Use the backend and the KV cache of a decoder.

        Raises:
            CapacityError: The plan needs more KV cache rows than the backend's context has.
        """
        if plan.cache_rows > decoder.cache.context:
            raise CapacityError(
                f"prompts and steps need up to {plan.cache_rows} tokens, {decoder.backend.name} has a context of "
                f"{decoder.cache.context}; use shorter prompts or fewer --steps"
            )
        self._backend, self._cache, self._tree = decoder.backend, decoder.cache, plan.tree
        self.summary_error: float | None = None

    def run(self, inputs: StepInputs) -> StepOutputs:
        """Run one step and return its outputs.

        Raises:
            CapacityError: The backend cannot run a step of this size.
        """
        if not inputs.length:
            self._cache.truncate(0)
        self._cache.reserve(inputs.length + len(inputs.ids))
        return self._run(self._step(inputs, inputs.ids))

    def _run(self, step: Step) -> StepOutputs:
        """Run a step, compare the summaries of its rows with its logits, and return its outputs."""
        self._backend.run(step)
        outputs = self._backend.read_outputs()
        rows = outputs[contract.LOGITS][0].astype(np.float32, copy=False)
        summaries = [self._backend.read_summary(row) for row in range(len(rows))]
        found = [one for one in summaries if one is not None]
        self.summary_error = summary_error(rows, found) if found else None
        return outputs

    def replay(self, step: ReferenceStep) -> StepOutputs:
        """Run a step that the reference has run, and commit the path that the reference committed.

        A tree step is run twice: first with this side's own candidates, to compare the tokens that its heads choose;
        then with the reference's tokens, to compare all other outputs. Two candidates of equal score may be ranked
        either way, and without the second run every output below such a candidate would count as an error.
        """
        inputs = step.inputs
        outputs = self.run(inputs)
        if inputs.kind == "tree":
            tokens: IntArray = step.outputs[contract.TOKENS][0].astype(np.int32)
            outputs = self._run(self._step(inputs, tokens)) | {contract.TOKENS: outputs[contract.TOKENS]}
        self.commit(step.path)
        return outputs

    def commit(self, path: Sequence[int]) -> None:
        """Keep these nodes of the last step in the KV cache."""
        self._cache.commit(path)

    def _step(self, inputs: StepInputs, ids: IntArray) -> Step:
        if inputs.kind != "tree":
            return literal_step(ids, inputs.length, np.array([len(ids) - 1], np.int32), summaries=True)
        tree = self._tree
        return Step(
            input_ids=ids[None],
            position_ids=(inputs.length + tree.depths)[None],
            tree_mask=np.ascontiguousarray(tree.mask[None]),
            past_length=np.array([inputs.length], np.int32),
            logit_rows=np.arange(tree.size, dtype=np.int32)[None],
            draft=True,
            summaries=True,
        )


def run_steps(reference: Reference, plan: ComparisonPlan, top_k: int) -> Iterator[ReferenceStep]:
    """Run every step of the plan on the reference; replay each one before the next one is requested.

    A prompt ends early at a stop token.

    Args:
        reference: The backend or the file that provides the correct outputs.
        plan: Prompts, tree and number of steps.
        top_k: The number of candidates of each head.
    """
    candidates, stop = plan.tree.candidate_ids(top_k), frozenset(plan.stop_ids)
    for prompt, ids in enumerate(plan.prompts, start=1):
        length, root = 0, 0
        for number, first in enumerate(range(0, len(ids), PREFILL_CHUNK), start=1):
            chunk = np.array(ids[first : first + PREFILL_CHUNK], np.int32)
            inputs = StepInputs(prompt, number, "prefill", chunk, length)
            outputs, path = reference.run(inputs), list(range(len(chunk)))
            yield ReferenceStep(inputs, outputs, path, reference.summary_error)
            reference.commit(path)
            length, root = length + len(chunk), int(outputs[contract.ARGMAX][0, -1])
        ended = root in stop
        for number in range(1, plan.steps + 1):
            if ended:
                break
            inputs = StepInputs(prompt, number, "plain", np.array([root], np.int32), length)
            outputs = reference.run(inputs)
            if len(candidates) > 1:
                yield ReferenceStep(inputs, outputs, [], reference.summary_error)
                nodes = candidates.copy()  # (T,)
                nodes[0] = root
                inputs = StepInputs(prompt, number, "tree", nodes, length)
                outputs = reference.run(inputs)
            tokens, argmax = (outputs[name][0].tolist() for name in (contract.TOKENS, contract.ARGMAX))
            path, root = greedy(plan.tree, tokens, argmax)
            yield ReferenceStep(inputs, outputs, path, reference.summary_error)
            reference.commit(path)
            length += len(path)
            ended = not stop.isdisjoint([root, *(tokens[node] for node in path)])
