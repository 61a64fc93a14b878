"""Runs the steps of a reference in one saved graph, in ONNX Runtime on the CPU.

Shapes: n tokens of a step, T nodes that the graph is given, R rows with logits, L layers, W elements of one token's
keys of one layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.ort_library import import_onnxruntime
from numpy.typing import NDArray

from medusa_exporter.graph.check import SavedGraph
from medusa_exporter.validation.errors import GraphMismatchError
from medusa_exporter.validation.kv_layouts import kv_layout
from medusa_exporter.validation.steps import BoolArray, FloatArray, IntArray, Past, ReferenceDraft, ReferenceStep, Rows

Array = NDArray[Any]


class NotServedError(Exception):
    """ONNX Runtime's CPU provider has no kernel for one of the graph's operators in its type."""


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step gave for one sequence, floats in fp32.

    rows: of its n tokens, logits (R, V) of `logit_rows` (R,) alone. argmax (R,), tokens (n,).
    """

    rows: Rows
    logit_rows: IntArray
    argmax: IntArray
    tokens: IntArray


class GraphRunner:
    """One graph in a session of its own, which ends with this object."""

    def __init__(self, graph: SavedGraph, *, packed: bool = False) -> None:
        """Load the graph. Raises NotServedError where the CPU lacks an operator, GraphMismatchError for other causes.

        packed: whether weights are packed anew, as for serving, which takes memory: quantised ones then run in the
        kernels that serve them. Others stay where they are on disk, in kernels that differ by the order of sums alone.
        """
        onnxruntime = import_onnxruntime("export")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = not packed  # as the runtime sets it
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.graph = graph
        self._inputs = {spec.name: spec for spec in graph.inputs}
        try:
            self._session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no base of their own
            reason = " ".join(str(error).split())[:300]
            if type(error).__name__ == "NotImplemented":
                raise NotServedError(reason) from error
            raise GraphMismatchError(
                f"{graph.path.name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); expected a "
                "graph that it runs: build with the versions of constraints.txt, and report this if it stays"
            ) from error
        self._past = kv_layout(graph, onnxruntime)

    @property
    def drafts(self) -> bool:
        """Whether its heads can run."""
        return contract.DRAFT_HIDDEN in self._inputs

    @property
    def most_nodes(self) -> int | None:
        """T of all its steps; None where it takes any number."""
        return None if self.graph.size is None else self.graph.size.nodes

    def parts(self, step: ReferenceStep) -> list[ReferenceStep]:
        """Return the steps by which the graph runs one of the reference, or as many of its first nodes as it takes.

        Nodes that stand alone are run in several steps. None for a tree where the graph takes tokens in a row alone,
        and for several nodes where it takes one.
        """
        most = self.most_nodes or step.nodes
        if contract.TREE_MASK not in self._inputs and not step.chained:
            most = 1
        if step.apart:
            return [step.part(at, min(at + most, step.nodes)) for at in range(0, step.nodes, most)]
        return [step.part(0, min(most, step.nodes))] if most > 1 else []

    def step(self, step: ReferenceStep) -> list[StepResult]:
        """Run one of `parts`; return what each sequence of the graph's batch gave, all of which were given the same."""
        return self._run(step.ids, step.positions, step.mask, step.past, None)

    def draft(self, draft: ReferenceDraft, candidates: IntArray) -> list[IntArray]:
        """Return the token of each symbolic id in `candidates` (n - 1,), all of which are children of the root.

        One array for each sequence of the graph's batch.
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
        T = n if size is None else size.nodes
        rows = np.arange(n, dtype=np.int32)  # whose logits are wanted: all, or the last where the graph gives fewer
        R = n if size is None else size.rows
        B = 1 if size is None else size.batch
        rows = rows[-R:]
        whole = np.eye(T, dtype=np.bool_)  # what fills the step up sees itself alone
        whole[:n, :n] = mask
        inputs: dict[str, Array] = {
            contract.INPUT_IDS: _filled(ids, T, 0)[None],
            contract.POSITION_IDS: _filled(positions, T, past.length)[None],
            contract.TREE_MASK: whole[None],
            contract.PAST_LENGTH: np.array([past.length], np.int32),
            contract.LOGIT_ROWS: _filled(rows, R, 0)[None],
        }
        if self.drafts:
            inputs[contract.DRAFT_HIDDEN] = self._draft_hidden(hidden)
        inputs = {name: np.repeat(array, B, axis=0) for name, array in inputs.items() if name in self._inputs}
        try:
            results, new = self._past.run(self._session, inputs, past)
        except GraphMismatchError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise GraphMismatchError(
                f"{self.graph.path.name}: ONNX Runtime stopped in a step of {T} nodes behind {past.length} rows "
                f"({reason}), expected results; report this together with the model's name"
            ) from error
        self._check_results(results, {"B": B, "T": T, "R": R})
        found = []
        for at in range(B):
            keys, values = np.split(new[at, :, :n].astype(np.float32), 2)
            logits = results[contract.LOGITS][at, : len(rows)].astype(np.float32)
            kept = Rows(keys, values, results[contract.HIDDEN][at, :n].astype(np.float32), logits)
            argmax, tokens = results[contract.ARGMAX][at, : len(rows)], results[contract.TOKENS][at, :n]
            found.append(StepResult(kept, rows, argmax, tokens))
        return found

    def _draft_hidden(self, hidden: FloatArray | None) -> FloatArray:
        """(1 or 0, S), of one sequence: no row where no head is to run, but for a graph whose heads always do."""
        N, S = self._inputs[contract.DRAFT_HIDDEN].shape
        if hidden is not None:
            return hidden[None]
        return np.zeros((1 if isinstance(N, int) else 0, int(S)), np.float32)

    def _check_results(self, results: dict[str, Array], sizes: dict[str, int]) -> None:
        """Raise GraphMismatchError for an output of another shape or type than the graph declares."""
        for spec in self.graph.outputs:
            if (result := results.get(spec.name)) is None:
                continue  # keys and values, which the form of the past has laid out by their declared shapes
            shape = tuple(sizes.get(one, -1) if isinstance(one, str) else one for one in spec.shape)
            if result.shape != shape or result.dtype != spec.dtype:
                raise GraphMismatchError(
                    f"{self.graph.path.name}: output {spec.name!r} came as {result.dtype}{list(result.shape)}, "
                    f"expected {spec.dtype}{list(shape)}; report this together with the model's name"
                )


def _filled(values: IntArray, count: int, rest: int) -> IntArray:
    """Lengthen (n,) to (count,) with `rest`."""
    filled = np.full(count, rest, np.int32)
    filled[: len(values)] = values
    return filled
