"""Runs recorded steps in a saved graph, with ONNX Runtime on the CPU.

Shapes: n tokens of a step, T nodes of the graph's input, R rows with logits, L layers, W elements of a token's keys in
a layer, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.base import RowSummary
from medusa_runtime.backends.integer_products import set_exact_products
from medusa_runtime.backends.ort_library import import_onnxruntime
from numpy.typing import NDArray

from medusa_exporter.graph.check import SavedGraph
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.kv_layouts import kv_layout
from medusa_exporter.validation.steps import BoolArray, FloatArray, IntArray, Past, RecordedDraft, RecordedStep, Rows

Array = NDArray[Any]


class MissingKernelError(Exception):
    """ONNX Runtime's CPU provider has no kernel for an operator of the graph in the operator's data type."""


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a graph computed in a step for one sequence, floats in fp32.

    Attributes:
        rows: Of its n tokens; logits (R, V) only of `logit_rows`.
        logit_rows: Rows with logits, (R,).
        argmax: Most likely token of each of these rows, (R,).
        tokens: Token of each node, (n,).
        summaries: Of each row with logits; None if the graph summarises no rows.
    """

    rows: Rows
    logit_rows: IntArray
    argmax: IntArray
    tokens: IntArray
    summaries: list[RowSummary] | None = None


class GraphRunner:
    """One graph in an ONNX Runtime session."""

    def __init__(self, graph: SavedGraph, *, packed: bool = False) -> None:
        """Load the graph.

        Args:
            graph: The saved graph.
            packed: Whether ONNX Runtime may repack weights, as it does when it serves the graph. This takes memory, but
                only so do quantised weights run in the kernels that serve them. The kernels for other weights differ
                by the order of additions only.

        Raises:
            NotServedError: If the CPU lacks an operator.
            GraphMismatchError: If the graph cannot be loaded for another reason.
        """
        onnxruntime = import_onnxruntime("export")
        options = onnxruntime.SessionOptions()
        set_exact_products(onnxruntime, options)
        options.log_severity_level = 3
        options.enable_mem_pattern = not packed  # as in the runtime
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.graph = graph
        self._inputs = {spec.name: spec for spec in graph.inputs}
        try:
            self._session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no common base class
            reason = " ".join(str(error).split())[:300]
            if type(error).__name__ == "NotImplemented":
                raise MissingKernelError(reason) from error
            raise GraphMismatchError(
                f"{graph.path.name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); expected a "
                "graph that it runs: build with the versions of constraints.txt, and report this if it stays"
            ) from error
        self._kv_layout = kv_layout(graph, onnxruntime)

    @property
    def drafts(self) -> bool:
        """Whether the graph has an input for heads, which a graph without heads ignores."""
        return contract.DRAFT_HIDDEN in self._inputs

    @property
    def most_nodes(self) -> int | None:
        """Number of nodes of each step; None if the graph accepts any number."""
        return None if self.graph.size is None else self.graph.size.nodes

    def parts(self, step: RecordedStep) -> list[RecordedStep]:
        """Split a recorded step into steps that the graph can run.

        Independent nodes are split into several steps; of other steps the graph runs as many of the first nodes as it
        accepts. Returns an empty list for a tree if the graph is causal, and for several dependent nodes if it accepts
        one.
        """
        most = self.most_nodes or step.nodes
        if contract.TREE_MASK not in self._inputs and not step.causal:
            most = 1
        if step.independent:
            return [step.part(at, min(at + most, step.nodes)) for at in range(0, step.nodes, most)]
        return [step.part(0, min(most, step.nodes))] if most > 1 else []

    def step(self, step: RecordedStep) -> list[StepResult]:
        """Run one of `parts` in all sequences of the graph's batch; return the result of each."""
        return self._run(step.ids, step.positions, step.mask, step.past, None)

    def draft(self, draft: RecordedDraft, candidates: IntArray) -> list[IntArray]:
        """Run a step with the heads, in which all candidates are children of the root.

        Args:
            draft: The root, and the input of the heads.
            candidates: Symbolic ids of candidates, (n - 1,), see `medusa_runtime.contract`.

        Returns:
            The token of each candidate, one array for each sequence of the graph's batch.
        """
        n = 1 + len(candidates)
        mask = np.eye(n, dtype=np.bool_)
        mask[:, 0] = True
        positions = np.minimum(np.arange(n, dtype=np.int32), 1) + np.int32(draft.past.length)
        ids = np.concatenate((np.array([draft.root], np.int32), candidates))
        return [found.tokens[1:] for found in self._run(ids, positions, mask, draft.past, draft.hidden)]

    def _run(
        self, ids: IntArray, positions: IntArray, mask: BoolArray, past: Past, hidden: FloatArray | None
    ) -> list[StepResult]:
        n, size = len(ids), self.graph.size
        B, T, R = (1, n, n) if size is None else (size.batch, size.nodes, size.rows)
        rows = np.arange(n, dtype=np.int32)[-R:]  # rows with logits: all, or the last ones if the graph computes fewer
        padded_mask = np.eye(T, dtype=np.bool_)  # a padding node attends to itself only
        padded_mask[:n, :n] = mask
        inputs: dict[str, Array] = {
            contract.INPUT_IDS: _padded(ids, T, 0)[None],
            contract.POSITION_IDS: _padded(positions, T, past.length)[None],
            contract.TREE_MASK: padded_mask[None],
            contract.PAST_LENGTH: np.array([past.length], np.int32),
            contract.LOGIT_ROWS: _padded(rows, R, 0)[None],
            contract.SUMMARY_ROWS: np.arange(R, dtype=np.int32)[None, ::-1],  # all rows, the last one first
        }
        if self.drafts:
            inputs[contract.DRAFT_HIDDEN] = self._draft_hidden(hidden)
        inputs = {name: np.repeat(array, B, axis=0) for name, array in inputs.items() if name in self._inputs}
        results, new = self._run_session(inputs, T, past)
        self._check_results(results, {"B": B, "T": T, "R": R, "S": R})
        return [_step_result(results, new, sequence, n, rows) for sequence in range(B)]

    def _run_session(self, inputs: dict[str, Array], T: int, past: Past) -> tuple[dict[str, Array], Array]:
        """Return the outputs by name, and the new keys and values. Raises GraphMismatchError if ONNX Runtime fails."""
        try:
            return self._kv_layout.run(self._session, inputs, past)
        except GraphMismatchError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise GraphMismatchError(
                f"{self.graph.path.name}: ONNX Runtime failed in a step of {T} nodes after {past.length} rows "
                f"({reason}), expected it to run; report this together with the model's name"
            ) from error

    def _draft_hidden(self, hidden: FloatArray | None) -> FloatArray:
        """Return the input of the heads, (1 or 0, E): no row if no head is to run, unless the graph runs all always."""
        N, E = self._inputs[contract.DRAFT_HIDDEN].shape
        if hidden is not None:
            return hidden[None]
        return np.zeros((1 if isinstance(N, int) else 0, int(E)), np.float32)

    def _check_results(self, results: dict[str, Array], sizes: dict[str, int]) -> None:
        """Raise GraphMismatchError for an output whose shape or data type is not what the graph declares."""
        for spec in self.graph.outputs:
            if (result := results.get(spec.name)) is None:
                continue  # keys and values, which the KV layout has checked by using their declared shapes
            shape = tuple(sizes.get(one, -1) if isinstance(one, str) else one for one in spec.shape)
            if result.shape != shape or result.dtype != spec.dtype:
                raise GraphMismatchError(
                    f"{self.graph.path.name}: output {spec.name!r} came as {result.dtype}{list(result.shape)}, "
                    f"expected {spec.dtype}{list(shape)}; report this together with the model's name"
                )


def _step_result(results: dict[str, Array], new: Array, sequence: int, n: int, logit_rows: IntArray) -> StepResult:
    """Return the result of one sequence of a step, without its padding."""
    R = len(logit_rows)
    keys, values = np.split(new[sequence, :, :n].astype(np.float32), 2)
    hidden = results[contract.HIDDEN][sequence, :n].astype(np.float32)
    logits = results[contract.LOGITS][sequence, :R].astype(np.float32)
    argmax, tokens = results[contract.ARGMAX][sequence, :R], results[contract.TOKENS][sequence, :n]
    summaries = None
    if contract.FINITE in results:
        finite, *columns = (results[name][sequence] for name in contract.SUMMARY_OUTPUTS)
        columns = [column[::-1][:R] for column in columns]
        summaries = [
            RowSummary(ids, top, float(total), bool(flag))
            for ids, top, total, flag in zip(*columns, finite[:R], strict=True)
        ]
    return StepResult(Rows(keys, values, hidden, logits), logit_rows, argmax, tokens, summaries)


def _padded(values: IntArray, count: int, rest: int) -> IntArray:
    """Pad (n,) to (count,) with `rest`."""
    padded = np.full(count, rest, np.int32)
    padded[: len(values)] = values
    return padded
